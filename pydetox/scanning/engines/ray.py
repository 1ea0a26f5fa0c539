"""Workers as Ray actors, on one or many machines. This needs the extra `pydetox[ray]`.

An actor is a `Worker` that exists as long as the run and keeps what it has read. The driver gives
each actor one task and announces the next one, whose file the actor reads meanwhile. It waits with
`ray.wait`, and never submits more than that. Checkpoints, images and base must have the same paths
on all machines. Results come back to the driver, and only the driver writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import EngineError, one_line
from ..config import ScannerConfig
from ..tasks import Notify, Outcome, Task, failure
from .open import CORES_PER_WORKER

#: The seconds that the first worker may take to start, because others may be using the cluster.
START_SECONDS = 180.0
#: The seconds that a cluster may take to answer.
ADDRESS_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
_ATTEMPTS = 2
_POLL = 1.0

# Ray waits for minutes for an address that does not answer, writes raw lines meanwhile, and can end
# the process. Therefore a child process tries the address; it can be abandoned.
_PROBE = (
    "import sys; sys.path[:] = sys.argv[2].split(chr(0x1f)); import ray; "
    "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"
)


def check_address(address: str, seconds: float = ADDRESS_SECONDS) -> None:
    """Raise EngineError unless a Ray cluster answers at an address within `seconds`."""
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    if port.isdigit() and host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EngineError(f"no Ray cluster answers at {address}: {reason}") from error
    path = chr(0x1F).join(entry or str(Path.cwd()) for entry in sys.path)
    probe = subprocess.Popen(
        [sys.executable, "-I", "-c", _PROBE, address, path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, said = probe.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"no Ray cluster answers at {address}: nothing came within {seconds:g} s"
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(probe.pid, signal.SIGKILL)
        probe.wait()
    if probe.returncode != 0:
        lines = [line for line in said.splitlines() if line.strip()]
        reason = one_line(lines[-1]) if lines else f"exit code {probe.returncode}"
        raise EngineError(f"no Ray cluster answers at {address}: {reason}")


class _Actor:
    """The actor that runs on the cluster. Its methods take and return JSON."""

    def __init__(self, config: str, device: str, threads: int | None) -> None:
        from ...progress import silence
        from ..worker import Worker

        silence()
        self._worker = Worker(ScannerConfig.from_dict(json.loads(config)), device, threads)

    def ready(self) -> int:
        """Return the process's number on its machine, as soon as everything is imported."""
        return os.getpid()

    def prepare(self, task: str) -> None:
        self._worker.prepare(Task.from_dict(json.loads(task)))

    def run(self, task: str) -> str:
        try:
            return json.dumps(self._worker.run(Task.from_dict(json.loads(task))))
        except Exception as error:  # noqa: BLE001 - a bug in one checkpoint must not end the others
            line = f"{type(error).__name__}: {error}"
            return json.dumps(failure(line, "internal", traceback=traceback.format_exc()))


@dataclass
class _Slot:
    """The driver's view of an actor."""

    number: int
    handle: Any
    starting: Any
    task: Task | None = None
    next: Task | None = None
    reference: Any = None
    since: float = 0.0
    ready: bool = False


class RayEngine:
    """The engine of this module."""

    def __init__(self, config: ScannerConfig, targets: int, notify: Notify) -> None:
        """Connect to the cluster, or start one on this machine.

        Raises EngineError if Ray is not installed, if the cluster does not answer, or if its
        machines have no room for the workers.
        """
        try:
            import ray
        except ImportError as error:
            raise EngineError("the engine ray needs Ray: install pydetox[ray]") from error
        self._ray = ray
        self._config, self._notify = config, notify
        self._own = not ray.is_initialized()
        self._slots: list[_Slot] = []
        if self._own:
            if config.address is not None:
                check_address(config.address)
            try:
                ray.init(
                    address=config.address,
                    include_dashboard=False if config.address is None else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            except Exception as error:
                line = one_line(str(error))
                raise EngineError(f"the Ray cluster cannot be reached: {line}") from error
        self._gpu = config.device.startswith("cuda")
        try:
            self._limit, self._threads = self._share_out(targets)
        except BaseException:
            self.close()
            raise

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield outcomes as they are done.

        Raises EngineError if no actor can be started, or none starts within `START_SECONDS`.
        """
        queue = deque(tasks)
        attempts: dict[int, int] = {}
        while queue or self._busy():
            while len(self._slots) < min(self._limit, len(queue) + self._busy()):
                self._hire()
            for slot in self._slots:
                if slot.ready:
                    self._assign(slot, queue, attempts)
            waiting = {slot.starting: slot for slot in self._slots if not slot.ready}
            running = {slot.reference: slot for slot in self._slots if slot.task}
            done, _ = self._ray.wait([*waiting, *running], timeout=_POLL)
            self._notify("waited")
            for reference in done:
                if reference in waiting:
                    self._welcome(waiting[reference])
                    continue
                outcome = self._collect(running[reference], queue, attempts)
                if outcome is not None:
                    yield outcome
            for slot in list(self._slots):
                outcome = self._expire(slot, queue, attempts)
                if outcome is not None:
                    yield outcome

    def close(self) -> None:
        """End all actors, and the cluster if this engine started it."""
        for slot in self._slots:
            with contextlib.suppress(Exception):
                self._ray.kill(slot.handle)
        self._slots.clear()
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()
            self._own = False

    def _busy(self) -> int:
        return sum(slot.task is not None or slot.next is not None for slot in self._slots)

    def _hire(self) -> None:
        numbers = {slot.number for slot in self._slots}
        number = next(n for n in range(self._limit) if n not in numbers)
        # The actor sees only its own GPU.
        device = "cuda:0" if self._gpu else "cpu"
        actor = self._ray.remote(
            num_cpus=self._threads,
            num_gpus=1 if self._gpu else 0,
            concurrency_groups={"io": 1},
            max_restarts=0,
        )(_Actor)
        handle = actor.remote(json.dumps(self._config.to_dict()), device, self._threads)
        self._slots.append(_Slot(number, handle, handle.ready.remote(), since=time.monotonic()))

    def _share_out(self, targets: int) -> tuple[int, int]:
        """Return the number of workers and of CPU threads of each.

        Raises EngineError for workers that can never fit on the present cluster, because Ray would
        let them wait forever.
        """
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus = [int(machine.get("CPU", 0)) for machine in machines]
        gpus = [int(machine.get("GPU", 0)) for machine in machines]
        slots = sum(gpus) if self._gpu else max(1, sum(cpus) // CORES_PER_WORKER)
        wanted = self._config.workers or max(1, slots)
        # An actor cannot be spread over machines.
        threads = self._config.threads or max(1, min(sum(cpus) // wanted, max(cpus, default=1)))
        limit = max(1, min(wanted, targets))
        if self._config.threads is None and self._config.workers is not None:
            while threads > 1 and sum(cpu // threads for cpu in cpus) < limit:
                threads -= 1
        room = sum(
            min(cpu // threads, gpu) if self._gpu else cpu // threads
            for cpu, gpu in zip(cpus, gpus, strict=True)
        )
        if self._config.workers is None:
            limit = min(limit, max(1, room))
        if room < limit:
            each = f"{threads} CPU{'s' if threads > 1 else ''}{' and 1 GPU' if self._gpu else ''}"
            raise EngineError(
                f"{limit} worker{'s' if limit > 1 else ''} of {each} each, but the Ray cluster has "
                f"room for {room}: {len(machines)} machine{'s' if len(machines) != 1 else ''} with "
                f"{' + '.join(map(str, cpus)) or 'no'} CPUs and {sum(gpus)} GPUs; ask for fewer "
                "workers or threads"
            )
        return limit, threads

    def _welcome(self, slot: _Slot) -> None:
        """Mark an actor as ready. Timeouts count from here."""
        try:
            pid = self._ray.get(slot.starting)
        except self._ray.exceptions.RayError as error:
            line = one_line(str(error))
            raise EngineError(f"a worker cannot be started: {line}") from error
        slot.ready = True
        self._notify("worker-started", worker=slot.number, pid=pid)

    def _assign(self, slot: _Slot, queue: deque[Task], attempts: dict[int, int]) -> None:
        if slot.task is None:
            task, slot.next = slot.next, None
            if task is None and queue:
                task = queue.popleft()
            if task is None:
                return
            slot.task, slot.since = task, time.monotonic()
            slot.reference = slot.handle.run.remote(json.dumps(task.to_dict()))
            self._notify("started", worker=slot.number, name=task.name, kind=task.kind)
        enough = self._limit == 1 or len(queue) > self._limit
        retried = attempts.get(slot.task.id) or (queue and attempts.get(queue[0].id))
        if slot.next is None and queue and queue[0].kind == "scan" and enough and not retried:
            slot.next = queue.popleft()
            slot.handle.prepare.options(concurrency_group="io").remote(
                json.dumps(slot.next.to_dict())
            )

    def _collect(self, slot: _Slot, queue: deque[Task], attempts: dict[int, int]) -> Outcome | None:
        task = slot.task
        assert task is not None
        try:
            value = json.loads(self._ray.get(slot.reference))
        except self._ray.exceptions.RayTaskError as error:
            # Raised in the actor outside of the task itself: it lives, and may be used again.
            value = failure(one_line(str(error)), "internal")
        except self._ray.exceptions.RayError as error:
            # Whatever else ends a call ends the actor or its machine; OutOfMemoryError, with which
            # Ray's memory monitor kills a worker, is no RayActorError.
            full = isinstance(error, self._ray.exceptions.OutOfMemoryError)
            how = "out of memory on its machine" if full else "the actor died"
            return self._bury(slot, queue, attempts, how)
        slot.task = slot.reference = None
        self._notify("idle", worker=slot.number)
        return Outcome(task, value, attempts.get(task.id, 0) + 1)

    def _bury(
        self, slot: _Slot, queue: deque[Task], attempts: dict[int, int], how: str
    ) -> Outcome | None:
        """Put a dead actor's tasks back into the queue, or report their failure."""
        task = self._dismiss(slot, queue)
        with contextlib.suppress(Exception):  # so that its CPUs are free for the next one
            self._ray.kill(slot.handle)
        self._notify("worker-died", worker=slot.number, how=how)
        attempts[task.id] = attempts.get(task.id, 0) + 1
        if attempts[task.id] < _ATTEMPTS:
            queue.appendleft(task)
            return None
        value = failure(f"its worker died {_ATTEMPTS} times (last: {how})", "crash")
        return Outcome(task, value, _ATTEMPTS)

    def _expire(self, slot: _Slot, queue: deque[Task], attempts: dict[int, int]) -> Outcome | None:
        if not slot.ready:
            others = any(other.ready for other in self._slots)
            if not others and time.monotonic() - slot.since > START_SECONDS:
                free = self._ray.available_resources()
                raise EngineError(
                    f"no worker could be started within {START_SECONDS:g} s: each asks for "
                    f"{self._threads} CPUs{' and 1 GPU' if self._gpu else ''}, and the Ray cluster "
                    f"has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
                )
            return None
        limit = self._config.timeout
        if limit is None or slot.task is None or slot.task.kind == "calibrate":
            return None
        if time.monotonic() - slot.since <= limit:
            return None
        task = self._dismiss(slot, queue)
        self._ray.kill(slot.handle)
        self._notify("timeout", worker=slot.number, name=task.name)
        value = failure(f"took more than {limit:g} s (timeout=)", "timeout")
        return Outcome(task, value, attempts.get(task.id, 0) + 1)

    def _dismiss(self, slot: _Slot, queue: deque[Task]) -> Task:
        """Remove a slot; its waiting task goes back into the queue."""
        self._slots.remove(slot)
        if slot.next is not None:
            queue.appendleft(slot.next)
        assert slot.task is not None
        return slot.task
