"""Reading the weights that an index describes, in one pass that also hashes the file.

Hash, index and weights come from one open descriptor, and the bytes that the index was made from
are compared again during the pass: a file that is exchanged or rewritten meanwhile is noticed.
Nothing is memory-mapped.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import torch

from pydetox.checkpoints.index import FileIndex, Span, TensorEntry, WeightsFile
from pydetox.checkpoints.safetensors_index import index_safetensors
from pydetox.checkpoints.torch_index import index_torch
from pydetox.errors import CheckpointError

_CHUNK = 1 << 20  # stays in the cache between being read, hashed and checked
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def index_file(file: WeightsFile) -> FileIndex:
    """Index a weights file of either format, told apart by content.

    Raises:
        CheckpointError: It is neither format, damaged, or its extension promises the other format.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
    """
    kind = _identify(file)
    suffix = Path(file.path).suffix.lower()
    if kind == "torch" and suffix == ".safetensors":
        raise CheckpointError("is named .safetensors, but holds a torch zip archive with a pickle")
    if kind == "safetensors" and suffix in _TORCH_SUFFIXES:
        raise CheckpointError(
            f"is named {suffix}, but holds safetensors; rename it to .safetensors"
        )
    return index_torch(file) if kind == "torch" else index_safetensors(file)


def read_weights(file: WeightsFile, index: FileIndex) -> tuple[dict[str, torch.Tensor], str]:
    """Read all tensors of ``index``.

    Returns:
        Name to tensor on the CPU (views of one storage in the file share one storage again, as with
        ``torch.load``), and the SHA-256 of the whole file in hexadecimal.

    Raises:
        CheckpointError: A checksum is wrong, or the file changed while it was read.
    """
    buffers = {
        key: torch.empty(span.nbytes, dtype=torch.uint8) for key, span in index.storages.items()
    }
    digest = _read_all(file, index, buffers)
    return {
        name: _view(entry, buffers[entry.storage]) for name, entry in index.tensors.items()
    }, digest


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
    if start[8:9] == b"{" or Path(file.path).suffix.lower() == ".safetensors":
        return "safetensors"
    if start[0] == 0x80 and 2 <= start[1] <= 5:
        raise CheckpointError("is a bare pickle, not a checkpoint that torch.save wrote")
    raise CheckpointError(
        f"is neither a safetensors file nor a torch zip archive (it begins with {start[:8]!r})"
    )


def _read_all(file: WeightsFile, index: FileIndex, buffers: dict[str, torch.Tensor]) -> str:
    """Fill ``buffers`` in one pass from the first byte to the last; return the file's SHA-256."""
    one_pass = _Pass(file)
    parts: list[tuple[int, int, str | bytes | Span]]
    parts = [(span.offset, span.nbytes, key) for key, span in index.storages.items()]
    parts += [(span.offset, span.nbytes, span) for span in index.others]
    parts += [(offset, len(data), data) for offset, data in index.parsed.items()]
    # An empty part may begin where another one does: it goes first.
    for offset, nbytes, part in sorted(parts, key=lambda entry: entry[:2]):
        one_pass.advance(offset - one_pass.position)
        if isinstance(part, bytes):
            again = bytearray(nbytes)
            one_pass.advance(nbytes, memoryview(again))
            if again != part:
                raise CheckpointError("changed while it was read")
            continue
        if isinstance(part, str):
            span, target = index.storages[part], buffers[part].numpy().data
        else:
            span, target = part, None
        crc = one_pass.advance(nbytes, target, checked=span.crc32 is not None)
        if span.crc32 not in (None, crc):
            raise CheckpointError(f"is damaged: the record at byte {offset} has a wrong checksum")
    one_pass.advance(file.size - one_pass.position)
    if os.pread(file.descriptor, 1, file.size):
        raise CheckpointError("grew while it was read")
    return one_pass.hasher.hexdigest()


class _Pass:
    """Reads a file from front to back, hashing all of it."""

    def __init__(self, file: WeightsFile) -> None:
        self.hasher = hashlib.sha256()
        self.position = 0
        self._descriptor = file.descriptor
        self._scratch = memoryview(bytearray(_CHUNK))

    def advance(
        self, count: int, target: memoryview | None = None, *, checked: bool = False
    ) -> int:
        """Read ``count`` bytes, into ``target`` if given; return their CRC-32 if ``checked``."""
        crc = done = 0
        while done < count:
            step = min(count - done, _CHUNK)
            chunk = self._scratch[:step] if target is None else target[done : done + step]
            got = os.preadv(self._descriptor, [chunk], self.position)
            if not got:
                raise CheckpointError("shrank while it was read")
            self.hasher.update(chunk[:got])
            if checked:
                crc = zlib.crc32(chunk[:got], crc)
            self.position += got
            done += got
        return crc


def _view(entry: TensorEntry, buffer: torch.Tensor) -> torch.Tensor:
    """Make the tensor that ``entry`` describes, on the bytes of its storage."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    stored = torch.uint8 if dtype == torch.bool else dtype
    tensor = buffer.view(stored).as_strided(entry.shape, entry.strides, entry.offset)
    # A bool whose byte is neither 0 nor 1 is undefined behaviour in compiled code.
    return tensor != 0 if dtype == torch.bool else tensor
