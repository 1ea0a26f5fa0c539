"""Reading the results of a run folder, during a scan or later."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .record import ScanRecord
from .scanner import record_of_part
from .store import read_events, read_part, read_run_config


@dataclass(frozen=True)
class Run:
    """The last scan of a run folder.

    Attributes:
        folder: The run folder.
        records: The records of the targets that were reached, in the order of the targets.
        not_reached: The names of all other targets, including those whose results are damaged.
            Empty if the scan was completed.
        ignored: The name and the reason of everything that was passed over.
        configuration: The part of the configuration that decides the results.
        calibration: The clean references; None without a base.
    """

    folder: Path
    records: tuple[ScanRecord, ...]
    not_reached: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]
    configuration: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read the last scan of a run folder; DataError if there is none or it is damaged."""
    path = Path(folder)
    configuration = read_run_config(path)["configuration"]
    names: Sequence[str] | None = None
    ignored: list[tuple[str, str]] = []
    found: dict[str, ScanRecord] = {}
    for event in read_events(path):
        if event["event"] == "run-started":
            names = event["targets"]
            ignored = [(one[0], one[1]) for one in event["ignored"]]
            found = {}
        elif event["event"] == "record":
            try:
                part = read_part(path, event["key"])
            except DataError:
                # The result is lost or damaged. Treat the target as not reached.
                found.pop(event["name"], None)
                continue
            found[event["name"]] = record_of_part(
                event["name"],
                event["key"],
                part,
                duplicate_of=event["duplicate_of"],
                resumed=event["resumed"],
            )
    if names is None:
        raise DataError(f"{path}: no scan has begun in this run")
    return Run(
        folder=path,
        records=tuple(found[name] for name in names if name in found),
        not_reached=tuple(name for name in names if name not in found),
        ignored=tuple(ignored),
        configuration=configuration,
        calibration=_calibration(path),
    )


@dataclass(frozen=True)
class Change:
    """How one target differs between two runs; None means that a run lacks it."""

    name: str
    before: ScanRecord | None
    after: ScanRecord | None

    @property
    def kind(self) -> str:
        """The first that holds of `new`, `gone`, `verdict`, `content`, `numbers` and `same`."""
        before, after = self.before, self.after
        if before is None or after is None:
            return "gone" if after is None else "new"
        if before.verdict != after.verdict:
            return "verdict"
        if before.sha256 != after.sha256:
            return "content"
        return "same" if _numbers(before) == _numbers(after) else "numbers"


def compare_runs(before: Run, after: Run) -> list[Change]:
    """Return how each target of two runs has changed, sorted by name, including `same`."""
    old = {record.name: record for record in before.records}
    new = {record.name: record for record in after.records}
    names = [*old, *(name for name in new if name not in old)]
    return [Change(name, old.get(name), new.get(name)) for name in names]


def _numbers(record: ScanRecord) -> dict[str, Any]:
    # Another configuration has other keys for the same results.
    return {k: v for k, v in record.content().items() if k not in ("key", "duplicate_of")}


def _calibration(folder: Path) -> dict[str, Any] | None:
    path = folder / "calibration.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected one JSON object")
    return {key: value for key, value in content.items() if key not in ("schema", "made_with")}
