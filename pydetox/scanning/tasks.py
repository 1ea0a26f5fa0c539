"""The messages between driver and workers: plain data that JSON can hold."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

#: The kinds of tasks. survey: Read, hash, check and compare the weights. calibrate: Scan clean
#: references. scan: Reconstruct triggers and judge them.
Kind = Literal["survey", "calibrate", "scan"]

#: The reasons why a task can fail. usage: The options make no sense for this checkpoint. unsafe:
#: The checkpoint tries to run code or to exhaust memory. checkpoint: The checkpoint or its images
#: cannot be read or do not fit. setup: The base or the known vectors cannot be read, so that no
#: task can succeed. crash: The worker died. timeout: The worker took too long. internal: pydetox
#: has a bug.
ErrorKind = Literal["usage", "unsafe", "checkpoint", "setup", "crash", "timeout", "internal"]

#: A function that is called with the name of an event and its details.
Notify = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Task:
    """One step of work on one checkpoint.

    name: The name of the checkpoint, for messages. payload: The data that the worker needs.
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
    """The outcome of a task.

    Attributes:
        task: The task.
        value: The value that the worker returned: {"result": ..., "seconds": ...} or {"error": ...,
            "kind": ...}.
        attempts: The number of attempts: 2 if a worker died during the first one.
    """

    task: Task
    value: Mapping[str, Any]
    attempts: int = 1

    @property
    def error(self) -> str | None:
        """The error message, one line; None without an error."""
        return self.value.get("error")

    @property
    def error_kind(self) -> ErrorKind | None:
        """The kind of error; None without an error."""
        return self.value.get("kind")


class Engine(Protocol):
    """An engine carries out tasks. It is not reentrant. `close` ends the workers."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield the outcome of each task as soon as it is done."""
        ...

    def close(self) -> None:
        """End all workers immediately. A second call does nothing."""
        ...


def failure(error: str, kind: ErrorKind, **more: Any) -> dict[str, Any]:
    """Return the value of a failed task."""
    return {"error": error, "kind": kind, **more}


def decode_artifacts(value: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files in the outcome of a scan, by name."""
    return {name: base64.b64decode(text) for name, text in value.get("artifacts", {}).items()}
