"""What the measuring process tells the one that started it: one JSON object a line, appended.

A line that is not complete counts for nothing, so that whatever ends the process leaves what was
measured before. The lines are `{"event": "start", "stage": ...}`, `{"event": "figure", "name": ...,
"value": ...}`, `{"event": "end", "stage": ..., "seconds": ..., ["error": ...]}` and `{"event":
"left out", "stage": ..., "reason": ...}`.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .summary import Value


def append(path: Path, **event: Value) -> None:
    """Add one line and flush it. It never continues a line that was cut off."""
    with path.open("ab+") as file:
        begun = file.seek(0, os.SEEK_END) > 0
        if begun:
            file.seek(-1, os.SEEK_END)
            begun = file.read(1) != b"\n"
        file.write((("\n" if begun else "") + json.dumps(event) + "\n").encode())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the events. Lines that were cut off are left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


@dataclass
class Progress:
    """What a list of events says.

    Attributes:
        figures: Name to value.
        results: `stage.NAME`, `.seconds`, `.error`, ... of the stages that are through.
        finished: Names of the stages that are through or left out.
        running: The stage that has started and not ended, or None.
    """

    figures: dict[str, Value] = field(default_factory=dict)
    results: dict[str, Value] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    running: str | None = None


def progress(events: list[dict[str, Any]]) -> Progress:
    """Add up events."""
    now = Progress()
    for event in events:
        kind, stage = event["event"], event.get("stage")
        if kind == "figure":
            now.figures[event["name"]] = event["value"]
        elif kind == "start":
            now.running = stage
        else:
            now.running = None
            now.finished.append(str(stage))
            key = f"stage.{stage}"
            if kind == "left out":
                now.results[key] = f"left out: {event['reason']}"
                continue
            now.results[key] = "failed" if "error" in event else "measured"
            extra = {k: v for k, v in event.items() if k not in ("event", "stage")}
            now.results.update({f"{key}.{name}": value for name, value in extra.items()})
    return now
