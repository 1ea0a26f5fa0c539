"""No workers: for one checkpoint, whose bars and whose bugs the user sees at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..config import ScannerConfig
from ..tasks import Notify, Outcome, Task

if TYPE_CHECKING:
    from ..worker import Worker


class InlineEngine:
    """Carries out tasks in this process, one after the other. A bug is raised, not reported."""

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
        """Let the worker's memory go."""
        self._worker = None
