"""Progress on stderr: a bar with rate and time left at a terminal, a line now and then elsewhere.

for batch in track(batches, "Evaluating"):
    ...

with Progress("Inverting triggers", total=200) as progress:
    progress.update(1)
    progress.set_description("Inverting triggers, stage 2")
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
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

from .errors import UsageError, one_line

T = TypeVar("T")


class Laps:
    """A stopwatch that adds up the wall time of named steps.

    Attributes:
        seconds: The time of each step, in seconds.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """Start. seconds: The times of earlier steps."""
        self.seconds = dict(seconds or {})
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Add the time since the last lap to a step."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now


class RateColumn(ProgressColumn):
    """A column that shows units per second."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s" if speed < 100 else f"{speed:,.0f}/s")


#: The environment variable with the seconds between two lines if stderr is no terminal, as in the
#: log of a batch system. `inf` writes no lines. The default is 30.
LINE_SECONDS = "PYDETOX_PROGRESS_SECONDS"

_silent = False


def silence() -> None:
    """Draw and write nothing in this process from now on: several may share one terminal."""
    global _silent
    _silent = True


class ProgressLines:
    """Writes a line of progress to stderr now and then (see `LINE_SECONDS`).

    total: The number of units of work; None if it is not known.
    Raises UsageError if the environment variable is no number above 0.
    """

    def __init__(self, total: float | None) -> None:
        self._total = total
        given = os.environ.get(LINE_SECONDS, "30")
        try:
            self._pause = float(given)
        except ValueError:
            self._pause = -1.0
        if not self._pause > 0:
            raise UsageError(f"{LINE_SECONDS} is {given!r}; expected a number of seconds above 0")
        self._done = 0.0
        self._start = self._last = time.monotonic()

    def update(self, description: str, n: float = 1) -> None:
        """Count `n` more units as done."""
        self._done += n
        now = time.monotonic()
        if now - self._last < self._pause:
            return
        self._last = now
        seconds = now - self._start
        rate = self._done / seconds
        of = "" if self._total is None else f" of {self._total:g}"
        line = f"{description}: {self._done:g}{of} after {seconds:.0f} s, {rate:.2g}/s"
        if self._total is not None and rate > 0:
            line += f", about {max(0.0, self._total - self._done) / rate:.0f} s left"
        # One write: lines of several processes do not mix.
        sys.stderr.write(f"{one_line(line)}\n")
        sys.stderr.flush()


@final
class Progress:
    """One step's progress, as a context manager.

    If stderr is no terminal, a line shows the progress, the rate and the time left every 30 seconds
    (see `LINE_SECONDS`). A step that ends sooner writes nothing.

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
        self._lines: ProgressLines | None = None

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
        elif not _silent:
            self._lines = ProgressLines(self._total)
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
        self._lines = None

    def update(self, n: float = 1) -> None:
        """Count `n` more units as done."""
        if self._bar is not None:
            self._bar.advance(self._task, n)
        elif self._lines is not None:
            self._lines.update(self._description, n)

    def set_description(self, description: str) -> None:
        """Change the description beside the bar."""
        self._description = description
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
