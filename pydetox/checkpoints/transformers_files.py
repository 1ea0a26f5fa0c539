"""Files beside the weights in a folder of transformers: its configurations, and those to keep."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.layout import COMPANION_NAMES
from pydetox.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError

#: The largest of those in public repositories have a few megabytes; SigLIP 2's tokenizer has 34.
_MAX_COMPANION_BYTES = 64 << 20
_MAX_CONFIG_BYTES = 1 << 20

Config = dict[str, Any]


def read_companions(folder: Path, names: Sequence[str] = COMPANION_NAMES) -> dict[str, bytes]:
    """Return the files beside the weights that a repaired folder needs as well, by name.

    names: the files that are looked for.

    Raises:
        CheckpointError: One of them cannot be read.
        UnsafeCheckpointError: One of them is far larger than any such file.
    """
    found = {}
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            with WeightsFile(path) as file:
                if file.size > _MAX_COMPANION_BYTES:
                    raise UnsafeCheckpointError(
                        f"has {file.size} bytes; expected at most {_MAX_COMPANION_BYTES}"
                    )
                found[name] = bytes(file.read_at(0, file.size, "the file"))
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from error
    return found


def read_object(path: str | os.PathLike[str]) -> Config:
    """Return the JSON object of a configuration file.

    Raises ArchitectureError for anything else, CheckpointError if the file cannot be read.
    """
    with WeightsFile(path) as file:
        if file.size > _MAX_CONFIG_BYTES:
            raise ArchitectureError(
                f"has {file.size} bytes; a configuration has at most {_MAX_CONFIG_BYTES}"
            )
        raw = file.read_at(0, file.size, "the configuration")
    try:
        content = json.loads(bytes(raw).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"is not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ArchitectureError("is not a JSON object")
    return content
