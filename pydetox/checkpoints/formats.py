"""Which format a weights file has, told by its content, and its index."""

from __future__ import annotations

from pathlib import Path

from pydetox.checkpoints.index import FileIndex, WeightsFile
from pydetox.checkpoints.safetensors_index import index_safetensors
from pydetox.checkpoints.torch_index import index_torch
from pydetox.errors import CheckpointError

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def index_file(file: WeightsFile) -> FileIndex:
    """Index a weights file of either format, told apart by content.

    Raises:
        CheckpointError: It is neither format, damaged, or its extension promises the other format.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
    """
    kind = _identify(file)
    suffix = _suffix(file)
    if kind == "torch" and suffix == ".safetensors":
        raise CheckpointError("is named .safetensors, but holds a torch zip archive with a pickle")
    if kind == "safetensors" and suffix in _TORCH_SUFFIXES:
        raise CheckpointError(
            f"is named {suffix}, but holds safetensors; rename it to .safetensors"
        )
    return index_torch(file) if kind == "torch" else index_safetensors(file)


def _identify(file: WeightsFile) -> str:
    start = file.read_at(0, min(file.size, 32), "the start of the file")
    if not start:
        raise CheckpointError("is empty (0 bytes)")
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start.startswith(_LEGACY_TORCH):
        raise CheckpointError(
            "has the format of torch before 1.6, which cannot be checked without unpickling. "
            "Convert it where you trust it: "
            "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "is a Git LFS pointer, not the weights themselves; run `git lfs pull`"
        )
    if start[8:9] == b"{" or _suffix(file) == ".safetensors":
        return "safetensors"
    if start[0] == 0x80 and 2 <= start[1] <= 5:
        raise CheckpointError("is a bare pickle, not a checkpoint that torch.save wrote")
    raise CheckpointError(
        f"is neither a safetensors file nor a torch zip archive (it begins with {start[:8]!r})"
    )


def _suffix(file: WeightsFile) -> str:
    return Path(file.path).suffix.lower()
