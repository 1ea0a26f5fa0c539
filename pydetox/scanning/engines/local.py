"""Worker processes on this machine.

The driver gives each worker one task. If this is the scan of a checkpoint, it also gives the next
task, whose file the worker reads meanwhile. If a worker dies, its task has used its first attempt,
and the waiting task goes back into the queue. The second attempt runs alone on its worker, so that
it cannot fail because of another file that is read ahead.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ...errors import EngineError
from ..config import ScannerConfig
from ..memory import share_of_gpu
from ..tasks import Notify, Outcome, Task, failure

# This uses `-I` and a path instead of `-m`, because the working folder may hold modules of
# strangers.
_COMMAND = (
    "import sys; sys.path[:] = sys.argv[2].split(chr(0x1f)); "
    "from pydetox.scanning.engines.process import main; main(int(sys.argv[1]))"
)
_ATTEMPTS = 2
_FALSE_STARTS = 3  # in a row
_POLL = 1.0  # seconds: how late a timeout may be noticed


class _Process:
    """The driver's view of a worker process."""

    def __init__(self, number: int, setup: dict[str, Any]) -> None:
        self.number = number
        self.ready = False
        self.tasks: deque[Task] = deque()  # the first one is worked on
        self.since = time.monotonic()
        mine, theirs = socket.socketpair()
        path = chr(0x1F).join(entry or str(Path.cwd()) for entry in sys.path)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _COMMAND, str(theirs.fileno()), path],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        except OSError as error:
            mine.close()
            raise EngineError(f"a worker cannot be started: {error.strerror or error}") from error
        finally:
            theirs.close()
        self.connection = Connection(mine.detach())
        self.send(setup)

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has died: reading will say so
            self.connection.send_bytes(json.dumps(message).encode())

    def kill(self) -> int:
        """End the process; return its exit status, which is negative for a signal."""
        self.process.kill()
        status = self.process.wait()
        self.connection.close()
        return status


class LocalEngine:
    """The engine of this module. Its processes end with it, even if it is killed."""

    def __init__(
        self,
        config: ScannerConfig,
        *,
        workers: int,
        threads: int,
        devices: Sequence[str],
        notify: Notify,
    ) -> None:
        """Prepare `workers` processes of `threads` CPU threads, which take `devices` in turn."""
        self._config, self._threads, self._devices = config, threads, list(devices)
        self._notify = notify
        self._limit = workers
        self._workers: dict[int, _Process] = {}
        self._started = False
        self._false_starts = 0
        self._outcomes: deque[Outcome] = deque()

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield outcomes as they are done. Raises EngineError if no worker can be started."""
        queue = deque(tasks)
        attempts: dict[int, int] = {}
        while True:
            busy = sum(bool(worker.tasks) for worker in self._workers.values())
            if not queue and not busy:
                return
            self._hire(min(self._limit, busy + len(queue)))
            for worker in self._workers.values():
                self._assign(worker, queue, attempts)
            self._wait()
            for worker in list(self._workers.values()):
                self._listen(worker, queue, attempts)
            while self._outcomes:
                yield self._outcomes.popleft()

    def close(self) -> None:
        """Kill all workers."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()

    def _hire(self, count: int) -> None:
        for number in range(self._limit):
            if len(self._workers) >= count:
                return
            if number not in self._workers:
                setup = {
                    "config": self._config.to_dict(),
                    "device": self._devices[number % len(self._devices)],
                    "threads": self._threads,
                    "share": share_of_gpu(self._limit, len(self._devices)),
                }
                worker = _Process(number, setup)
                self._workers[number] = worker
                self._notify("worker-started", worker=number, pid=worker.process.pid)

    def _assign(self, worker: _Process, queue: deque[Task], attempts: dict[int, int]) -> None:
        while worker.ready and queue:
            task = queue[0]
            if worker.tasks:
                retried = attempts.get(task.id) or attempts.get(worker.tasks[0].id)
                # Near the end, no task waits at a worker while another worker could begin it.
                enough = self._limit == 1 or len(queue) > self._limit
                if len(worker.tasks) > 1 or task.kind != "scan" or retried or not enough:
                    return
            queue.popleft()
            if not worker.tasks:
                worker.since = time.monotonic()
            worker.tasks.append(task)
            worker.send(task.to_dict())

    def _wait(self) -> None:
        timeout = _POLL
        if self._config.timeout is not None:
            for worker in self._workers.values():
                if worker.tasks and worker.ready:
                    left = worker.since + self._config.timeout - time.monotonic()
                    timeout = min(timeout, max(0.0, left))
        wait([worker.connection for worker in self._workers.values()], timeout)
        self._notify("waited")

    def _listen(self, worker: _Process, queue: deque[Task], attempts: dict[int, int]) -> None:
        try:
            while worker.connection.poll():
                self._take(worker, json.loads(worker.connection.recv_bytes()), attempts)
        except (EOFError, OSError, ValueError):
            self._bury(worker, queue, attempts)
            return
        limit = self._config.timeout
        late = limit is not None and time.monotonic() - worker.since > limit
        if late and worker.ready and worker.tasks and worker.tasks[0].kind != "calibrate":
            task = worker.tasks.popleft()
            queue.extendleft(reversed(worker.tasks))
            del self._workers[worker.number]
            worker.kill()
            self._notify("timeout", worker=worker.number, name=task.name)
            value = failure(f"took more than {limit:g} s (timeout=)", "timeout")
            self._outcomes.append(Outcome(task, value, attempts.get(task.id, 0) + 1))

    def _take(self, worker: _Process, message: dict[str, Any], attempts: dict[int, int]) -> None:
        if "failed" in message:
            raise EngineError(f"a worker cannot be started: {message['failed']}")
        if "ready" in message:
            worker.ready = self._started = True
            self._false_starts = 0
        elif "started" in message:
            worker.since = time.monotonic()
            task = worker.tasks[0]
            self._notify("started", worker=worker.number, name=task.name, kind=task.kind)
        elif "done" in message:
            task = worker.tasks.popleft()
            worker.since = time.monotonic()
            self._notify("idle", worker=worker.number)
            self._outcomes.append(Outcome(task, message["value"], attempts.get(task.id, 0) + 1))

    def _bury(self, worker: _Process, queue: deque[Task], attempts: dict[int, int]) -> None:
        """Put a dead worker's tasks back into the queue, or report their failure."""
        del self._workers[worker.number]
        status = worker.kill()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        self._notify("worker-died", worker=worker.number, how=how)
        self._false_starts += not worker.ready
        if self._false_starts and (not self._started or self._false_starts >= _FALSE_STARTS):
            raise EngineError(f"a worker cannot be started: it ended with {how}")
        if not worker.tasks:
            return
        task = worker.tasks.popleft()
        queue.extendleft(reversed(worker.tasks))
        attempts[task.id] = attempts.get(task.id, 0) + 1
        if attempts[task.id] < _ATTEMPTS:
            queue.appendleft(task)
            return
        value = failure(f"its worker died {_ATTEMPTS} times (last: {how})", "crash")
        self._outcomes.append(Outcome(task, value, _ATTEMPTS))
