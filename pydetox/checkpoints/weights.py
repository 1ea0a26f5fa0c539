"""The weights that an index describes, as tensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pydetox.checkpoints.formats import index_file
from pydetox.checkpoints.index import FileIndex, TensorEntry, WeightsFile, quote
from pydetox.checkpoints.reading import read_pass
from pydetox.checkpoints.sandbox import index_in_sandbox
from pydetox.checkpoints.sources import OpenWeights
from pydetox.errors import CheckpointError

__all__ = ["index_file", "read_open", "read_safetensors", "read_weights"]


def read_weights(file: WeightsFile, index: FileIndex) -> tuple[dict[str, torch.Tensor], str]:
    """Read all tensors of ``index``.

    Returns:
        Name to tensor on the CPU (views of one storage in the file share one storage again, as with
        ``torch.load``), and the SHA-256 of the whole file in hexadecimal.

    Raises:
        CheckpointError: A checksum is wrong, the file changed while it was read, or its weights are
            larger than this machine's memory.
    """
    _check_memory([index])
    buffers = {
        key: torch.empty(span.nbytes, dtype=torch.uint8) for key, span in index.storages.items()
    }
    digest = read_pass(file, index, {key: buffer.numpy().data for key, buffer in buffers.items()})
    return {
        name: _view(entry, buffers[entry.storage]) for name, entry in index.tensors.items()
    }, digest


def read_open(weights: OpenWeights) -> tuple[dict[str, torch.Tensor], str]:
    """Read all tensors of all files; like :func:`read_weights`, and with its errors.

    Returns:
        Name to tensor, and the hash of the checkpoint (see :meth:`OpenWeights.sha256`).
    """
    _check_memory([index for _, index in weights.files])
    tensors: dict[str, torch.Tensor] = {}
    digests = []
    for file, index in weights.files:
        try:
            found, digest = read_weights(file, index)
        except CheckpointError as error:
            if weights.shards is None:
                raise
            raise type(error)(f"shard {quote(Path(file.path).name)}: {error}") from error
        tensors.update(found)
        digests.append(digest)
    return tensors, weights.sha256(digests)


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a ``.safetensors`` file that is no checkpoint, such as one with triggers.

    The sandbox indexes the file, as it does for checkpoints: a stranger may have made it.

    Returns:
        Name to tensor on the CPU, and the metadata of the file.

    Raises:
        CheckpointError: The file is damaged, has another format, changed while it was read, or is
            larger than this machine's memory.
        UnsafeCheckpointError: The file exhausted the limits of the sandbox.
    """
    with WeightsFile(path) as file:
        index = index_in_sandbox(file)
        if index.format != "safetensors":
            raise CheckpointError(f"has the format {index.format}; expected safetensors")
        tensors, _ = read_weights(file, index)
    return tensors, dict(index.metadata)


def _check_memory(indexes: list[FileIndex]) -> None:
    needed = sum(span.nbytes for index in indexes for span in index.storages.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:  # a sparse file takes no room on the disk
        raise CheckpointError(
            f"holds {needed / 2**30:.1f} GiB of weights, more than the {memory / 2**30:.1f} GiB of "
            "memory of this machine"
        )


def _view(entry: TensorEntry, buffer: torch.Tensor) -> torch.Tensor:
    """Make the tensor that ``entry`` describes, on the bytes of its storage."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    stored = torch.uint8 if dtype == torch.bool else dtype
    tensor = buffer.view(stored).as_strided(entry.shape, entry.strides, entry.offset)
    if 0 in entry.strides:
        tensor = tensor.contiguous()  # expanded: its elements must not change together
    if entry.conjugate:
        tensor = tensor.conj().resolve_conj()
    if entry.negative:
        tensor = tensor.neg()
    # A bool whose byte is neither 0 nor 1 is undefined behaviour in compiled code.
    return tensor != 0 if dtype == torch.bool else tensor
