"""The display of a run at a terminal: progress, rate, time left, and the work of each worker."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..errors import one_line
from ..progress import ProgressLines, RateColumn
from ..reporting.values import clean_text, duration

_STAGES = {"survey": "survey", "calibrate": "clean references", "scan": "scan"}

# The number of checkpoints that a line names, of those that are worked on.
_NAMED = 3


class Display:
    """Draws at a terminal, writes a line now and then elsewhere; `log` writes one in both.

    It is a context manager. Call it with the events of a `Scanner`.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._live: Live | None = None
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar = self._bars.add_task("scan", total=None)
        self._workers: dict[int, tuple[str, float]] = {}
        self._counts: dict[str, int] = {}
        self._stage = ""
        self._memory = ""
        self._lines: ProgressLines | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: str, **particulars: Any) -> None:
        """Handle an event of a `Scanner`."""
        handle = getattr(self, f"_on_{event.replace('-', '_')}", None)
        if handle is not None:
            handle(**particulars)

    def log(self, message: str, kind: str = "error") -> None:
        """Write a line about an error, by default one of a single checkpoint."""
        line = f"{kind}: {one_line(message)}"
        if self._live is None:
            print(line, file=sys.stderr)  # noqa: T201
        else:
            self._console.print(Text(line))

    def _on_warning(self, message: str) -> None:
        self.log(message, kind="warning")

    def _on_worker_started(self, worker: int, pid: int) -> None:
        # A single checkpoint in this process draws its own bar; workers draw none.
        if self._live is None and sys.stderr.isatty():
            self._live = Live(get_renderable=self._render, console=self._console, transient=True)
            self._live.start()
        elif self._live is None and self._lines is None:
            self._lines = ProgressLines(None)
        self._workers[worker] = ("starting", time.monotonic())

    def _on_worker_died(self, worker: int, how: str) -> None:
        del how
        self._workers.pop(worker, None)

    def _on_stage(self, name: str, total: int) -> None:
        self._stage = name
        if self._lines is not None:
            self._lines = ProgressLines(total)
        self._bars.reset(self._bar, total=total, description=_STAGES[name])

    def _on_memory(self, needed: int) -> None:
        self._memory = f", at most about {needed / 2**30:.1f} GiB a worker"

    def _on_surveyed(self, name: str) -> None:
        del name
        self._advance()

    def _on_record(self, record: Any) -> None:
        self._counts[record.verdict] = self._counts.get(record.verdict, 0) + 1
        if self._stage == "scan" and record.duplicate_of is None:
            self._advance()

    def _on_waited(self) -> None:
        """Let the line for a batch system's log come also while no task ends."""
        if self._lines is None:
            return
        now = time.monotonic()
        busy = [
            f"{clean_text(name)}, {duration(now - since)}"
            for _, (name, since) in sorted(self._workers.items())
            if name != "idle"
        ]
        stage = _STAGES.get(self._stage, self._stage) or "workers"
        named = "; ".join(busy[:_NAMED]) + (f"; {len(busy) - _NAMED} more" * (len(busy) > _NAMED))
        self._lines.update(f"{stage} ({named})" if named else stage, 0)

    def _advance(self) -> None:
        self._bars.advance(self._bar)
        if self._lines is not None:
            self._lines.update(_STAGES.get(self._stage, self._stage))

    def _on_started(self, worker: int, name: str, kind: str) -> None:
        del kind
        self._workers[worker] = (name, time.monotonic())

    def _on_idle(self, worker: int) -> None:
        self._workers[worker] = ("idle", time.monotonic())

    def _render(self) -> Group:
        now = time.monotonic()
        lines = [
            Text(f"  worker {number}: {clean_text(name)}, {duration(now - since)}", "dim")
            for number, (name, since) in sorted(self._workers.items())
        ]
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self._counts.items())
        return Group(self._bars, Text(f"  {counts}{self._memory}"), *lines)
