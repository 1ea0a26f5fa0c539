"""The parts as processes: each with a log, a time limit, and an outcome in words."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 3.0  # seconds between asking a process to end and ending it


class Clock:
    """Seconds since the start and until the deadline."""

    def __init__(self, limit: float) -> None:
        self._start = time.monotonic()
        self.deadline = self._start + limit

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: Of its log, NAME.log, and of its keys in the summary.
        command: Program and arguments, run in `folder` with `environment` added.
        limit: Seconds after which it is stopped.
        expected: Seconds without which it is not worth starting.
    """

    name: str
    command: Sequence[str]
    limit: float
    expected: float = 5.0
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = ROOT


@dataclass(frozen=True)
class Outcome:
    """How a part went.

    Its result is `passed`, `failed (exit code 1)`, `stopped after 60 s` (its own limit), `not
    finished: ...` (the limit of all parts), or `left out: ...`.
    """

    name: str
    result: str
    seconds: float = 0.0
    tail: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end and was right."""
        return self.result == "passed"

    @property
    def unfinished(self) -> bool:
        """Whether there was no time for it, which says nothing about right or wrong."""
        return self.result.startswith(("left out", "not finished"))


class Running:
    """A part at work. Its whole process group ends with it.

    limit: The seconds that it gets. If they are fewer than its own limit, it is not its fault that
    it does not finish.
    """

    def __init__(self, part: Part, logs: Path, limit: float) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.part, self._limit = part, limit
        self._log = logs / f"{part.name}.log"
        self._start = time.monotonic()
        environment = {**os.environ, **part.environment}
        with self._log.open("ab") as log:
            try:
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    list(part.command),
                    cwd=part.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A group of its own, to end it with its children; in the same session, which
                    # ends with whoever started this one.
                    preexec_fn=os.setpgrp,
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                self._process = None

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._start

    def wait(self, watch: Callable[[], str | None] | None = None) -> Outcome:
        """Wait for its end or its limit.

        watch: called about four times a second; ends the part when it returns a reason.
        """
        name, process = self.part.name, self._process
        if process is None:
            return Outcome(name, "failed (could not be started)", tail=self.tail())
        try:
            while process.poll() is None:
                reason = watch() if watch is not None else None
                if reason is None and self.seconds > self._limit:
                    reason = f"stopped after {self._limit:.0f} s"
                    if self._limit < self.part.limit:
                        reason = f"not finished: {reason}, no time left"
                if reason is not None:
                    return Outcome(name, reason, self.seconds, self.tail())
                time.sleep(0.25 if watch is not None else 0.05)
        finally:
            self.stop()  # and what it may have left behind in its group
        if process.returncode == 0:
            return Outcome(name, "passed", self.seconds)
        return Outcome(name, f"failed (exit code {process.returncode})", self.seconds, self.tail())

    def stop(self) -> None:
        """End the process and what it started."""
        process = self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            if process.poll() is None and number == signal.SIGTERM:
                try:
                    process.wait(_GRACE)
                except subprocess.TimeoutExpired:
                    continue
        process.wait()

    def tail(self, lines: int = 12) -> str:
        """Return the end of its log."""
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        return "\n".join(text.strip().splitlines()[-lines:])[-2000:]
