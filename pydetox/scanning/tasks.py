"""What drivers and workers tell each other: plain data, so that it can go through JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

#: survey: read, hash, check and compare the weights. calibrate: scan clean references.
#: scan: reconstruct triggers and judge.
Kind = Literal["survey", "calibrate", "scan"]

#: Why a task failed. usage: the options make no sense for this checkpoint; unsafe: a checkpoint
#: that wants to run code or exhaust memory; checkpoint: it, or the images for it, cannot be read or
#: do not fit; setup: the base or the vectors cannot be read, so that no task can succeed; crash,
#: timeout: of the worker; internal: a bug.
ErrorKind = Literal["usage", "unsafe", "checkpoint", "setup", "crash", "timeout", "internal"]

#: Called with the name of an event and its particulars.
Notify = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Task:
    """One step of work on one checkpoint.

    name: For people. payload: What the worker needs.
    """

    id: int
    kind: Kind
    name: str
    payload: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "id": self.id,
            "kind": self.kind,
            "name": self.name,
            "payload": dict(self.payload),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Task:
        """Read back what `to_dict` returned."""
        return cls(**content)


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: Which.
        value: What the worker returned: {"result": ..., "seconds": ...} or {"error", "kind"}.
        attempts: 1, or 2 after a worker has died over it.
    """

    task: Task
    value: Mapping[str, Any]
    attempts: int = 1

    @property
    def error(self) -> str | None:
        """One line that says what went wrong, or None."""
        return self.value.get("error")

    @property
    def error_kind(self) -> ErrorKind | None:
        """Why it went wrong, or None."""
        return self.value.get("kind")


class Engine(Protocol):
    """Carries out tasks somewhere. Not reentrant; `close` ends the workers."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield an outcome for each task, as they come."""
        ...

    def close(self) -> None:
        """End all workers at once; may be called twice."""
        ...


def failure(error: str, kind: ErrorKind, **more: Any) -> dict[str, Any]:
    """Return the value of an outcome that failed."""
    return {"error": error, "kind": kind, **more}


def decode_artifacts(value: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files that the outcome of a scan brings, by name."""
    return {name: base64.b64decode(text) for name, text in value.get("artifacts", {}).items()}
