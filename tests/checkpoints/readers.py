"""What every reader makes of every file of the corpora: the table `readers.json`.

Each row names a file and says what pydetox does (`read`, `refused`, or `unsafe` for what is built
to do harm), how its findings or its refusal begin, and what the loaders do that people use:

- `torch`: `torch.load(weights_only=True)`, or `safetensors.torch.load_file`, and the dictionary
  that pydetox names;
- `open_clip`, `timm`: how they load and unwrap a file;
- `picklescan`: the verdict of that scanner (1.0.5), where it was installed.

A loader reads `same` weights as pydetox, `other` ones, `some` where pydetox reads none, `nothing`
that a model could take, or `refuses`. `-`: not put to it. After a change, make the table anew:

    python -m tests.checkpoints.readers > tests/checkpoints/readers.json
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip.factory
import safetensors.torch
import timm.models._helpers
import torch

from pydetox.checkpoints import Checkpoint, inspect_checkpoint, load_checkpoint, sandbox
from pydetox.errors import CheckpointError, UnsafeCheckpointError
from tests.checkpoints.deceptive_corpus import DECEPTIVE
from tests.checkpoints.differential import difference, lock_up, weights_of
from tests.checkpoints.honest_corpus import HONEST
from tests.checkpoints.hostile_corpus import CORPUS

TABLE = Path(__file__).with_name("readers.json")
Row = dict[str, Any]

#: Builds a file in a folder, by the name of the file in the corpora.
FILES: dict[str, Callable[[Path], Path]] = {
    **{case.name: case.build for case in HONEST},
    **{case.name: case.build for case in [*CORPUS, *DECEPTIVE]},
}
# Some loader takes seconds for these, or gigabytes, or crashes (torch, of deep nesting as a key).
_NOT_FOR_OTHERS = {
    "a list of itself twice, and so on",
    "a million names by reference",
    "deep nesting",
    "deep nesting as a key",
    "flood of instructions",
    "flood of memo entries",
    "oversized pickle",
    "sparse file of a terabyte",
    "zip bomb",
}
_MEMORY = 8 << 30  # address space: torch alone takes several GiB
_FRAGMENT = 60


def versions() -> dict[str, str]:
    """What the answers of the other loaders depend on."""
    packages = ("torch", "safetensors", "open_clip_torch", "timm")
    return {name: importlib.metadata.version(name).partition("+")[0] for name in packages}


def rows(names: list[str]) -> Iterator[Row]:
    """Put files to every reader. Changes this process: use a child."""
    logging.disable(logging.CRITICAL)
    with sandbox._lock:
        sandbox._running()  # before nothing can be started any more
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    lock_up(largest_file=1 << 40)  # one of them is sparse
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield {"name": name, **_row(name, FILES[name](Path(folder)))}


def _row(name: str, path: Path) -> Row:
    found, row = _ours(path)
    row |= {"torch": "-", "open_clip": "-", "timm": "-", "picklescan": "-"}
    if not path.is_file() or path.suffix == ".json" or name in _NOT_FOR_OTHERS:
        return row
    key = inspect_checkpoint(path).weights_key if found is not None else ""
    for reader, load in {
        "torch": lambda: _of_library(path, key),
        "open_clip": lambda: open_clip.factory.load_state_dict(str(path)),
        "timm": lambda: timm.models._helpers.load_state_dict(str(path), use_ema=True),
    }.items():
        row[reader] = _theirs(load, found)
    row["picklescan"] = picklescan(path) or "-"
    return row


def _ours(path: Path) -> tuple[Checkpoint | None, Row]:
    try:
        found = load_checkpoint(path, model="ViT-B-32", allow_nonfinite=True)
    except CheckpointError as error:
        said = str(error).removeprefix(f"{path}: ").replace(str(path.parent), "")
        kind = "unsafe" if isinstance(error, UnsafeCheckpointError) else "refused"
        return None, {"pydetox": kind, "says": [fragment(said)]}
    says = [f"{one.rule}: {fragment(one.message)}" for one in found.findings]
    return found, {"pydetox": "read", "says": says}


def fragment(message: str) -> str:
    """The beginning of a message, without numbers: they may differ between versions of torch."""
    return re.sub(r"\d+", "#", message)[:_FRAGMENT]


def _of_library(path: Path, key: str) -> object:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    loaded: Any = torch.load(path, weights_only=True, map_location="cpu")
    for part in filter(None, key.split("/")):
        loaded = loaded[part]
    return loaded


def _theirs(load: Callable[[], object], found: Checkpoint | None) -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loaded = load()
    except Exception:  # noqa: BLE001 - whatever it is, nothing is read
        return "refuses"
    if not isinstance(loaded, dict) or not any(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        return "nothing"
    if found is None:
        return "some"
    if not weights_of(found.state_dict, loaded):
        return "nothing"
    return "same" if difference(found.state_dict, loaded) is None else "other"


def picklescan(path: Path) -> str | None:
    """The verdict of picklescan, which no test needs; None where it is not installed."""
    try:
        from picklescan.scanner import scan_file_path
    except ImportError:
        return None
    try:
        result = scan_file_path(str(path))
    except Exception:  # noqa: BLE001
        return "error"
    if result.issues_count:
        return "dangerous"
    return "error" if result.scan_err else "clean"


def main() -> None:
    """Print the table."""
    sys.stdout.write(json.dumps({"versions": versions()})[:-1] + ', "files": [\n')
    for number, row in enumerate(rows(list(FILES))):
        sys.stdout.write((",\n" if number else "") + json.dumps(row))
        sys.stdout.flush()
    sys.stdout.write("\n]}\n")


if __name__ == "__main__":
    main()
