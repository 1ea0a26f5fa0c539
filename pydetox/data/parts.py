"""The parts of a data set, such as training and test, in the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError

#: What people call parts of a data set, in small letters, and the part that each word means.
_PART_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
}

PARTS = frozenset(_PART_OF)

_WORD = re.compile(r"[a-z]+")


def refuse_parts_in_files(files: Sequence[Path], source: str) -> None:
    """Raise DataError for files of several parts of a data set, which are not one set.

    source: The folder or the pattern that was given, for the message, which names one part.
    """
    ends: dict[str, list[tuple[Path, int]]] = {}
    for path in files:
        word = next((w for w in _WORD.finditer(path.name.lower()) if w[0] in PARTS), None)
        if word is not None:
            ends.setdefault(_PART_OF[word[0]], []).append((path, word.end()))
    if len(ends) < 2:
        return
    found = sorted(ends)
    chosen = ends["test" if "test" in ends else found[-1]]
    path, end = chosen[0]
    one = path if len(chosen) == 1 else path.with_name(f"{path.name[:end]}*{path.suffix}")
    raise DataError(
        f"{source}: its files are the parts of a data set ({', '.join(found)}), not one set; name "
        f"one of them, such as {one}"
    )


def refuse_parts(values: Sequence[str], source: str) -> None:
    """Raise DataError for a column that puts rows into several parts of a data set.

    source: The file and the column, for the message.
    """
    found = {value.lower() for value in values}
    if found <= PARTS and len({_PART_OF[value] for value in found}) > 1:
        raise DataError(
            f"{source}: its rows are of several parts of a data set ({', '.join(sorted(found))}), "
            "not one set; save the rows of one part as a table of their own"
        )
