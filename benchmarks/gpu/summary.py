"""summary.json: one flat object, rewritten whole after every part.

Keys: what was run on (`device`, `torch`, ...), `part.NAME`, `stage.NAME` and their `.seconds` and
`.error`, and the figures, which begin with the type of the device that they were measured on:
`cuda.stamp_f32.forward_us`. Nothing measured on a CPU has a key that begins with `cuda`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pydetox.atomic import write_file

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "pydetox.check-gpu/1"
Value = str | int | float


class SummaryError(ValueError):
    """A file is no summary that this version can read, or may not be used as asked."""


class Summary:
    """What is known so far; `save` writes it, so that a kill at any moment keeps it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Value] = {"schema": SCHEMA}

    def update(self, values: Mapping[str, Value]) -> None:
        """Take over values, texts without the paths of this machine, and write the file."""
        for key, value in values.items():
            self.values[key] = without_paths(value) if isinstance(value, str) else value
        self.save()

    def save(self) -> None:
        """Write the file: under another name first, then renamed."""
        write_file(self._path, json.dumps(self.values, indent=1) + "\n")


def without_paths(text: str) -> str:
    """Return a text whose paths begin in the tree or in site-packages: results are published."""
    return re.sub(r"[^\s'\"]*/site-packages/", "site-packages/", text.replace(f"{ROOT}/", ""))


def read_summary(path: Path) -> dict[str, Value]:
    """Return what a summary.json holds; SummaryError unless it is one of this schema."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SummaryError(f"{path}: not JSON: {error}") from error
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA:
        raise SummaryError(f"{path}: schema {found!r}; expected {SCHEMA!r}")
    whole: dict[str, Value] = values
    for key, value in whole.items():
        if not isinstance(value, (str, int, float)):
            raise SummaryError(f"{path}: {key} is {value!r}; expected a number or a string")
    return whole


def figures(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the figures of the summary's own device, without its type in front."""
    prefix = f"{values['device_type']}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
