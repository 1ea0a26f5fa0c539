"""Ray actors, on one machine or many: the extra `pydetox[ray]`.

An actor is a `Worker` that lives as long as the run and keeps what it has read. The driver gives
each actor one task and tells it of the next, so that its file is read meanwhile; it waits with
`ray.wait` and never has more than that under way. Checkpoints, images and base must have the same
paths on all machines; results come back to the driver, which alone writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import EngineError
from ..config import ScannerConfig
from ..tasks import Notify, Outcome, Task, failure

_ATTEMPTS = 2
_POLL = 1.0


class _Actor:
    """What runs on the cluster. Its methods take and return JSON."""

    def __init__(self, config: str, device: str, threads: int | None) -> None:
        from ...progress import silence
        from ..worker import Worker

        silence()
        self._worker = Worker(ScannerConfig.from_dict(json.loads(config)), device, threads)

    def ready(self) -> int:
        """Return the process's number on its machine, once everything is imported."""
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
    """An actor as the driver sees it."""

    number: int
    handle: Any
    task: Task | None = None
    next: Task | None = None
    reference: Any = None
    since: float = 0.0
    ready: bool = False


class RayEngine:
    """See the module."""

    def __init__(self, config: ScannerConfig, targets: int, notify: Notify) -> None:
        """Connect to the cluster, or start one on this machine.

        Raises EngineError when Ray is not installed or the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError as error:
            raise EngineError("the engine ray needs Ray: install pydetox[ray]") from error
        self._ray = ray
        self._config, self._notify = config, notify
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(
                    address=config.address,
                    include_dashboard=False if config.address is None else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            except Exception as error:
                raise EngineError(f"Ray cannot be reached: {error}") from error
        resources = ray.cluster_resources()
        self._gpu = config.device.startswith("cuda")
        cores = int(resources.get("CPU", 1))
        slots = int(resources.get("GPU", 0)) if self._gpu else max(1, cores // 4)
        wanted = config.workers or max(1, slots)
        self._threads = config.threads or max(1, cores // wanted)
        self._limit = max(1, min(wanted, targets))
        self._slots: list[_Slot] = []

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield outcomes as they come. Raises EngineError when no actor can be started."""
        queue = deque(tasks)
        attempts: dict[int, int] = {}
        while queue or self._busy():
            while len(self._slots) < min(self._limit, len(queue) + self._busy()):
                self._hire()
            self._await_ready()
            for slot in self._slots:
                self._assign(slot, queue, attempts)
            running = {slot.reference: slot for slot in self._slots if slot.task}
            done, _ = self._ray.wait(list(running), timeout=_POLL)
            for reference in done:
                outcome = self._collect(running[reference], queue, attempts)
                if outcome is not None:
                    yield outcome
            for slot in list(self._slots):
                outcome = self._expire(slot, queue, attempts)
                if outcome is not None:
                    yield outcome

    def close(self) -> None:
        """End all actors, and the cluster if it was started here."""
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
        # The actor's own GPU is the only one that it sees.
        device = "cuda:0" if self._gpu else "cpu"
        actor = self._ray.remote(
            num_cpus=self._threads,
            num_gpus=1 if self._gpu else 0,
            concurrency_groups={"io": 1},
            max_restarts=0,
        )(_Actor)
        handle = actor.remote(json.dumps(self._config.to_dict()), device, self._threads)
        self._slots.append(_Slot(number, handle))

    def _await_ready(self) -> None:
        """Let new actors import what they need before a timeout counts."""
        new = [slot for slot in self._slots if not slot.ready]
        try:
            numbers = self._ray.get([slot.handle.ready.remote() for slot in new])
        except self._ray.exceptions.RayActorError as error:
            raise EngineError(f"an actor cannot be started: {error}") from error
        for slot, pid in zip(new, numbers, strict=True):
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
        except self._ray.exceptions.RayActorError:
            return self._bury(slot, queue, attempts)
        slot.task = slot.reference = None
        self._notify("idle", worker=slot.number)
        return Outcome(task, value, attempts.get(task.id, 0) + 1)

    def _bury(self, slot: _Slot, queue: deque[Task], attempts: dict[int, int]) -> Outcome | None:
        """Take a dead actor's tasks back."""
        task = self._dismiss(slot, queue)
        self._notify("worker-died", worker=slot.number, how="the actor died")
        attempts[task.id] = attempts.get(task.id, 0) + 1
        if attempts[task.id] < _ATTEMPTS:
            queue.appendleft(task)
            return None
        value = failure(f"its worker died {_ATTEMPTS} times", "crash")
        return Outcome(task, value, _ATTEMPTS)

    def _expire(self, slot: _Slot, queue: deque[Task], attempts: dict[int, int]) -> Outcome | None:
        limit = self._config.timeout
        if limit is None or slot.task is None or slot.task.kind == "calibrate":
            return None
        if time.monotonic() - slot.since <= limit:
            return None
        task = self._dismiss(slot, queue)
        self._ray.kill(slot.handle)
        self._notify("timeout", worker=slot.number, name=task.name)
        value = failure(f"took more than {limit:g} s (--timeout)", "timeout")
        return Outcome(task, value, attempts.get(task.id, 0) + 1)

    def _dismiss(self, slot: _Slot, queue: deque[Task]) -> Task:
        """Give up a slot; what was only waiting there goes back into the queue."""
        self._slots.remove(slot)
        if slot.next is not None:
            queue.appendleft(slot.next)
        assert slot.task is not None
        return slot.task
