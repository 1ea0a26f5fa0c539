"""Which files a command may replace: earlier results, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

# Enough for the names of a result and for the head of an HTML page.
_BYTES = 1 << 16

_STRING = r'"(?:[^"\\]|\\.)*"'
_DOCUMENTS = (
    "scan|unlearn|evals?|inverts?|localize|inspect|compare|targets|models|datasets|bench|demo"
    "|demo-text|doctor"
)
#: How results begin, in every format that some command writes.
_BEGINNINGS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf'\{{\s*"schema": "pydetox\.(?:{_DOCUMENTS})/\d',
        r'\{\s*"\$schema": "[^"]*/sarif-schema[^"]*",.{,400}"name": "pydetox"',
        rf'\{{"name": {_STRING}, "(?:verdict|error|path|kind)": ',  # JSON lines
        r"<!doctype html>\n.{,2000}<title>pydetox ",
        r"name,(?:sha256,(?:verdict|clean_accuracy|target)|format,sha256|kind,classes),",
        r"name,path,problem\n",
        r"pydetox (?:scan|eval)\n",
        r"[^\n]+\n  format: ",  # inspect
        r"\S+ +(?:images|class names) +",  # datasets
    )
)
#: How texts end that begin with names of targets.
_ENDS = (
    re.compile(r"(?:^|\n)\d+ to scan, \d+ passed over[^\n]*\n(?:[^\n]+\n)?$"),
    re.compile(r"(?:^|\n)\d+ changed, \d+ the same\n$"),
)
_KINDS = {
    "a calibration": (re.compile(r'\{\s*"schema": "pydetox\.calibration/\d'),),
    "a list of models": (re.compile(r"# Which models are read\n"),),
    "a result": _BEGINNINGS,
}


def kind_of_result(option: str) -> str:
    """Return what an option, such as `save_calibration`, writes: a key of the kinds above."""
    special = {"save_calibration": "a calibration", "markdown": "a list of models"}
    return special.get(option, "a result")


def is_earlier(path: Path, kind: str) -> bool:
    """Return whether a command that writes a kind of result may have written a file.

    An empty file, as `mktemp` makes it, counts. Raises OSError for a file that cannot be read.
    """
    with path.open("rb") as file:
        first = file.read(_BYTES)
        size = file.seek(0, 2)
        file.seek(max(0, size - _BYTES))
        last = file.read()
    if not first:
        return True
    if b"\0" in first:
        return False
    begin = first.decode("utf-8", "replace")
    if any(pattern.match(begin) for pattern in _KINDS[kind]):
        return True
    end = last.decode("utf-8", "replace")
    return kind == "a result" and any(pattern.search(end) for pattern in _ENDS)
