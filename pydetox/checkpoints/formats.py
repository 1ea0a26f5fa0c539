"""Which format a weights file has, told by its content, and its index."""

from __future__ import annotations

from pathlib import Path

from pydetox.checkpoints.index import FileIndex, WeightsFile, quote
from pydetox.checkpoints.legacy_index import LEGACY_START, index_legacy
from pydetox.checkpoints.safetensors_index import index_safetensors
from pydetox.checkpoints.torch_index import index_torch
from pydetox.errors import CheckpointError

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7-Zip",
}


def index_file(file: WeightsFile, weights_key: str | None = None) -> FileIndex:
    """Index a weights file of any format, told apart by content.

    Args:
        file: The file.
        weights_key: Of a pickled checkpoint: the dictionary that holds the weights, where the usual
            one is not meant (see :func:`pydetox.checkpoints.weight_sets.choose_weights`).

    Raises:
        CheckpointError: It is neither format, damaged, or its extension promises the other format.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
    """
    kind = _identify(file)
    suffix = _suffix(file)
    if kind != "safetensors" and suffix == ".safetensors":
        raise CheckpointError("is named .safetensors, but holds a torch zip archive with a pickle")
    if kind == "safetensors" and suffix in _TORCH_SUFFIXES:
        raise CheckpointError(
            f"is named {suffix}, but holds safetensors; rename it to .safetensors"
        )
    if kind == "legacy":
        return index_legacy(file, weights_key)
    if kind == "torch":
        return index_torch(file, weights_key)
    if weights_key is not None:
        raise CheckpointError(
            f"is a safetensors file, which has no dictionary {quote(weights_key)} in it: leave "
            "weights_key= out"
        )
    return index_safetensors(file)


def _identify(file: WeightsFile) -> str:
    start = file.read_at(0, min(file.size, 32), "the start of the file")
    if not start:
        raise CheckpointError("is empty (0 bytes)")
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start.startswith(LEGACY_START):
        return "legacy"
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "is a Git LFS pointer, not the weights themselves; run `git lfs pull`"
        )
    if start[8:9] == b"{" or _suffix(file) == ".safetensors":
        return "safetensors"
    if file.size >= 512 and file.read_at(257, 5, "the start of the file") == b"ustar":
        raise CheckpointError(
            "is a tar archive, as torch before 0.1.10 wrote them. Convert it where you trust it: "
            "torch.save(torch.load(FILE, weights_only=False), NEW_FILE)"
        )
    if start[0] == 0x80 and 2 <= start[1] <= 5:
        raise CheckpointError("is a bare pickle, not a checkpoint that torch.save wrote")
    if start.lstrip()[:1] in (b"<", b"{"):
        raise CheckpointError(
            f"is text, such as a web page or a server's error (it begins with {start[:16]!r}); "
            "fetch the weights again"
        )
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            raise CheckpointError(f"is compressed with {program}; unpack it first")
    raise CheckpointError(
        f"is neither a safetensors file nor a torch zip archive (it begins with {start[:8]!r})"
    )


def _suffix(file: WeightsFile) -> str:
    return Path(file.path).suffix.lower()
