"""The engine without worker processes, for a single checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..config import ScannerConfig
from ..tasks import Notify, Outcome, Task

if TYPE_CHECKING:
    from ..worker import Worker


class InlineEngine:
    """An engine that carries out tasks in this process, in order. It raises bugs at once."""

    def __init__(self, config: ScannerConfig, device: str, notify: Notify) -> None:
        self._config = config
        self._notify = notify
        self._device = device
        self._worker: Worker | None = None

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield the outcomes in order."""
        if self._worker is None:
            from ..worker import Worker

            self._worker = Worker(self._config, self._device, self._config.threads)
        for task in tasks:
            self._notify("started", worker=0, name=task.name, kind=task.kind)
            yield Outcome(task, self._worker.run(task))

    def close(self) -> None:
        """Release the worker and its memory."""
        self._worker = None
