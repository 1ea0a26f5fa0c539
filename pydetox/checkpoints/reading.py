"""One pass over a file that hashes it, checks it and takes the weights from it.

Hash, index and weights come from one open descriptor, and the bytes that the index was made from
are compared again during the pass: a file that is exchanged or rewritten meanwhile is noticed.
Nothing is memory-mapped here.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping

from pydetox.checkpoints.index import FileIndex, Span, WeightsFile
from pydetox.errors import CheckpointError

_CHUNK = 1 << 20  # stays in the cache between being read, hashed and checked


def read_pass(file: WeightsFile, index: FileIndex, buffers: Mapping[str, memoryview]) -> str:
    """Read a file from its first byte to its last, checking all that can be checked.

    Args:
        file: The file.
        index: Its index.
        buffers: Takes the bytes of storages, by their key; storages without a buffer are only
            checked.

    Returns:
        The SHA-256 of the whole file in hexadecimal.

    Raises:
        CheckpointError: A checksum is wrong, or the file changed since it was indexed.
    """
    one_pass = _Pass(file)
    parts: list[tuple[Span, str | None]] = []
    parts += [(span, key) for key, span in index.storages.items()]
    parts += [(span, None) for span in index.others]
    parsed = hashlib.sha256()
    seams = set(index.parsed)
    parts += [(span, None) for span in index.parsed]
    # An empty part may begin where another one does: it goes first.
    for span, key in sorted(parts, key=lambda part: (part[0].offset, part[0].nbytes)):
        one_pass.advance(span.offset - one_pass.position)
        target = None if key is None else buffers.get(key)
        again = parsed if key is None and span in seams else None
        crc = one_pass.advance(span.nbytes, target, checked=span.crc32 is not None, also_hash=again)
        if span.crc32 not in (None, crc):
            raise CheckpointError(
                f"is damaged: the record at byte {span.offset} has a wrong checksum"
            )
    one_pass.advance(file.size - one_pass.position)
    if os.pread(file.descriptor, 1, file.size):
        raise CheckpointError("grew while it was read")
    if parsed.hexdigest() != index.parsed_sha256:
        raise CheckpointError("changed while it was read")
    return one_pass.hasher.hexdigest()


def parsed_sha256(file: WeightsFile, index: FileIndex) -> str:
    """Hash again the bytes that the index was made from."""
    hasher = hashlib.sha256()
    for span in index.parsed:
        hasher.update(file.read_at(span.offset, span.nbytes, "the index"))
    return hasher.hexdigest()


class _Pass:
    """Reads a file from front to back, hashing all of it."""

    def __init__(self, file: WeightsFile) -> None:
        self.hasher = hashlib.sha256()
        self.position = 0
        self._descriptor = file.descriptor
        self._scratch = memoryview(bytearray(_CHUNK))

    def advance(
        self,
        count: int,
        target: memoryview | None = None,
        *,
        checked: bool = False,
        also_hash: hashlib._Hash | None = None,
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
            if also_hash is not None:
                also_hash.update(chunk[:got])
            if checked:
                crc = zlib.crc32(chunk[:got], crc)
            self.position += got
            done += got
        return crc
