"""The contents of weights files, read from their indexes without torch, unpickling or weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydetox.checkpoints.index import ITEM_SIZES, Finding, TensorEntry
from pydetox.checkpoints.naming import parse_reference
from pydetox.checkpoints.reading import read_pass
from pydetox.checkpoints.sources import find_weights, open_weights
from pydetox.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Inspection:
    """The contents of the weights files of one checkpoint.

    Attributes:
        path: The weights file, or the index of its shards.
        format: ``"safetensors"`` or ``"torch"``.
        files: The names of the shards; empty for a single file.
        nbytes: The size of the file, or of all shards, in bytes.
        tensors: The dtype, shape and place of each tensor, by name.
        metadata: The text metadata of a safetensors file.
        findings: Odd things about the files.
        weights_key: The key of a pickled dictionary that holds the weights; empty for the
            dictionary itself.
        sha256: The SHA-256 of the file, or of the shards (see
            :meth:`pydetox.checkpoints.sources.OpenWeights.sha256`); None if it was not computed.
    """

    path: Path
    format: str
    files: tuple[str, ...]
    nbytes: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    findings: tuple[Finding, ...]
    sha256: str | None
    weights_key: str = ""

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors; each of several tied tensors counts."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "path": str(self.path),
            "format": self.format,
            "files": list(self.files),
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "parameters": self.parameters,
            "tensors": [
                {
                    "name": name,
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "bytes": math.prod(entry.shape) * ITEM_SIZES[entry.dtype],
                }
                for name, entry in self.tensors.items()
            ],
            "weights_key": self.weights_key,
            "metadata": self.metadata,
            "findings": [{"rule": f.rule, "message": f.message} for f in self.findings],
        }


def inspect_checkpoint(
    reference: str | os.PathLike[str],
    *,
    hash_content: bool = False,
    weights_key: str | None = None,
) -> Inspection:
    """Return the contents of a checkpoint on this machine, without reading its weights.

    The sandbox indexes the files.

    Args:
        reference: A weights file, a ``*.safetensors.index.json``, or a folder.
        hash_content: Whether to read the whole files, to compute their SHA-256 and to check the
            checksums inside.
        weights_key: As in :func:`pydetox.checkpoints.load_checkpoint`.

    Raises:
        CheckpointError: It is missing or damaged.
        UnsafeCheckpointError: It is built to do harm.
        UsageError: ``reference`` is not on this machine.
    """
    parsed = parse_reference(reference)
    if parsed.path is None:
        raise UsageError(f"{parsed.text}: expected a file or folder on this machine")
    path = find_weights(parsed.path, folder_expected=parsed.kind == "local-dir")
    try:
        with open_weights(path, weights_key) as weights:
            digests = [read_pass(f, index, {}) for f, index in weights.files if hash_content]
            return Inspection(
                path=path,
                format=weights.format,
                files=tuple(weights.shards.files) if weights.shards is not None else (),
                nbytes=weights.nbytes,
                tensors=weights.tensors,
                metadata=weights.metadata,
                findings=weights.findings,
                sha256=weights.sha256(digests) if hash_content else None,
                weights_key=weights.files[0][1].weights_key,
            )
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
