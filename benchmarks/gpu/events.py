"""What the measuring process tells the one that started it: one JSON object a line, appended.

A line is complete or it is not there, so that whatever ends the process leaves what was measured
before. `{"event": "start", "stage": ...}`, `{"event": "figure", "name": ..., "value": ...}`,
`{"event": "end", "stage": ..., "seconds": ..., ["error": ...]}`, `{"event": "left out", ...}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .summary import Value


def append(path: Path, **event: Value) -> None:
    """Add one line and flush it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the events; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


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
