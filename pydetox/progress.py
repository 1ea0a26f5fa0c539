"""Progress on stderr: a bar with rate and time left at a terminal, silence in a pipe.

for batch in track(batches, "Evaluating"):
    ...

with Progress("Inverting triggers", total=200) as progress:
    progress.update(1)
    progress.set_description("Inverting triggers, stage 2")
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

T = TypeVar("T")


class RateColumn(ProgressColumn):
    """A column that shows units per second."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s" if speed < 100 else f"{speed:,.0f}/s")


_silent = False


def silence() -> None:
    """Draw no bars in this process from now on: several processes may share one terminal."""
    global _silent
    _silent = True


@final
class Progress:
    """One step's progress, as a context manager. Nothing is written when stderr is no terminal.

    Args:
        description: A text that says what is being done.
        total: The number of units of work; None if it is not known.
        console: The console to draw on, terminal or not; None for stderr when the context is
            entered.
    """

    def __init__(
        self, description: str, total: float | None = None, *, console: Console | None = None
    ) -> None:
        self._description = description
        self._total = total
        self._console = console
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        console = self._console or Console(file=sys.stderr)
        # `Console.is_terminal` would be wrong: with FORCE_COLOR it takes a pipe for a terminal.
        if not _silent and (self._console is not None or sys.stderr.isatty()):
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                RateColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,  # results stay on the screen, bars do not
            )
            self._task = self._bar.add_task(self._description, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, n: float = 1) -> None:
        """Count `n` more units as done."""
        if self._bar is not None:
            self._bar.advance(self._task, n)

    def set_description(self, description: str) -> None:
        """Change the description beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=description)


def track(iterable: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Yield the items of `iterable` while a bar shows how many have been taken.

    total: number of items; None to ask the iterable for its length, if it has one.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total) as progress:
        for item in iterable:
            yield item
            progress.update()
