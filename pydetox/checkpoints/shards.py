"""The index of a checkpoint that is split into several files.

``model.safetensors.index.json`` or ``pytorch_model.bin.index.json`` (the format of transformers)
says in ``weight_map`` which file holds which tensor. It comes from a stranger: its paths must not
lead anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pydetox.checkpoints.index import Format, WeightsFile, quote
from pydetox.checkpoints.layout import index_of_shard
from pydetox.errors import CheckpointError, UnsafeCheckpointError

MAX_INDEX_BYTES = 4 << 20
MAX_SHARDS = 256
_BIN_INDEX_SUFFIX = ".bin.index.json"


@dataclass(frozen=True)
class ShardIndex:
    """Which file holds which tensors.

    Attributes:
        name: Name of the index file.
        own_sha256: SHA-256 of the index file.
        files: Name of each shard, in bytewise order, to the names of its tensors.
        format: The format of all shards.
    """

    name: str
    own_sha256: str
    files: dict[str, list[str]]
    format: Format = "safetensors"

    def sha256(self, digests: Mapping[str, str]) -> str:
        """Hash of shards and index; digests: of the shards, by name."""
        lines = {**digests, self.name: self.own_sha256}
        text = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items()))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def is_shard_index(path: Path) -> bool:
    """Whether a file is to be read as an index of shards: by its name."""
    return path.name.lower().endswith(".index.json")


def read_shard_index(path: Path) -> ShardIndex:
    """Read and check an index of shards.

    Raises:
        CheckpointError: It is no such index.
        UnsafeCheckpointError: It is oversized, names something twice, or a path that is no plain
            file name.
    """
    with WeightsFile(path) as file:
        if file.size > MAX_INDEX_BYTES:
            raise UnsafeCheckpointError(
                f"has {file.size} bytes, an index of shards has at most {MAX_INDEX_BYTES}"
            )
        raw = file.read_at(0, file.size, "the index of the shards")
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON ({error})") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no object 'weight_map' that says which file holds which tensor")
    # An index of safetensors must not lead to pickles, which transformers would then run.
    pickles = path.name.lower().endswith(_BIN_INDEX_SUFFIX)
    suffix = ".bin" if pickles else ".safetensors"
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(_plain_name(tensor, name, suffix), []).append(tensor)
    if len(files) > MAX_SHARDS:
        raise UnsafeCheckpointError(f"names {len(files)} files, at most {MAX_SHARDS} are accepted")
    for name in sorted(entry.name for entry in path.parent.iterdir()):
        if index_of_shard(name) == path.name and name not in files:
            raise CheckpointError(
                f"does not name {quote(name)}, which lies beside it as one of its shards; remove "
                "that file if it is the rest of an earlier save"
            )
    return ShardIndex(
        name=path.name,
        own_sha256=hashlib.sha256(raw).hexdigest(),
        files=dict(sorted(files.items())),
        format="torch" if pickles else "safetensors",
    )


def shard_path(folder: Path, name: str) -> Path:
    """Where the shard ``name`` in ``folder`` is, with symbolic links followed.

    Links may lead to another place in the folder, or, in a cache of the Hugging Face hub, to the
    files of the same repository.

    Raises:
        CheckpointError: It is missing.
        UnsafeCheckpointError: A link leads elsewhere.
    """
    own = Path(os.path.realpath(folder))
    roots = [own]
    if own.parent.name == "snapshots" and own.parent.parent.name.startswith("models--"):
        roots.append(own.parent.parent / "blobs")
    try:
        target = Path(os.path.realpath(folder / name, strict=True))
    except OSError as error:
        raise CheckpointError(f"is missing ({error.strerror})") from None
    if not any(target.is_relative_to(root) for root in roots):
        raise UnsafeCheckpointError("is a symbolic link that leads out of its folder")
    return target


def _plain_name(tensor: str, name: object, suffix: str) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"tensor {quote(tensor)}: its file is not text")
    plain = (
        name.isprintable()
        and not any(character in name for character in "/\\:\0")
        and not name.startswith(".")
        and name.lower().endswith(suffix)
        and len(os.fsencode(name)) <= 255
    )
    if not plain:
        raise UnsafeCheckpointError(
            f"tensor {quote(tensor)}: its file is {quote(name)}, expected the plain name of a "
            f"{suffix} file in the same folder"
        )
    return name


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnsafeCheckpointError(f"has the name {quote(twice)} twice")
    return result


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
