"""Weights that stay in their file: mapped into memory and looked at part by part.

The index is made and checked first, as for a file that is read as a whole. Then only what is asked
for is mapped (reading it into a buffer would copy everything once), and counts as memory of this
process as long as somebody holds it. A file that shrinks meanwhile is an error, not the end of the
process: see csrc/ops/mapped_file.h.
"""

from __future__ import annotations

import math
import os
import warnings
import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pydetox.checkpoints.index import (
    ITEM_SIZES,
    Span,
    TensorEntry,
    WeightsFile,
    refuse_ambiguous,
)
from pydetox.checkpoints.loading import locate_weights
from pydetox.checkpoints.reading import parsed_sha256
from pydetox.checkpoints.sandbox import index_in_sandbox
from pydetox.errors import CheckpointError
from pydetox.ops._library import native

_CHUNK = 1 << 20


class MappedWeights:
    """The tensors of one weights file, of which only the parts that are asked for are in memory.

    Opening it reads the index and, of a file with checksums (`.pt`), all bytes once. Close it, or
    use it as a context manager; tensors that `elements` returned stay valid.

    Args:
        reference: The name of a checkpoint, as in `load_checkpoint`.
        cache_dir: The folder for hub downloads; None for the hub's default.
        offline: Whether to use only files on this machine.

    Attributes:
        name: The name that was given.
        path: The weights file.
        entries: The dtype and shape of each tensor by name, in the file's order. Wrapper prefixes
            are removed.

    Raises:
        CheckpointError: The file cannot be found, fetched, mapped or read.
        UnsafeCheckpointError: The file is built to run code or to exhaust memory.
        UsageError: The name has no meaning.
    """

    def __init__(
        self,
        reference: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool = False,
    ) -> None:
        self.name = os.fspath(reference)
        self.path = locate_weights(reference, cache_dir=cache_dir, offline=offline)
        try:
            self._file = WeightsFile(self.path)
        except CheckpointError as error:
            raise type(error)(f"{self.path}: {error}") from error
        try:
            self._state = self._look()
            if self.path.name.lower().endswith(".index.json"):
                raise CheckpointError("is the index of several shards, expected a single file")
            self._index = index_in_sandbox(self._file)
            refuse_ambiguous(self._index.findings)
            self._damage = native.Damage()
            self.entries = self._index.tensors
            self._copy: tuple[str, Tensor] | None = None
            with warnings.catch_warnings():
                # Said once in a process: that the memory cannot be written to. Nobody does.
                warnings.simplefilter("ignore")
                torch.frombuffer(self._map(0, 1), dtype=torch.uint8)
            self._check_sums()
        except CheckpointError as error:
            self._file.close()
            raise type(error)(f"{self.path}: {error}") from error
        except BaseException:
            self._file.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def identity(self) -> tuple[int, ...]:
        """What changes when another file takes the place of this one, or this one is rewritten."""
        return self._state

    def elements(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` elements of a tensor from `first` on, in row-major order: [count].

        They are the file's own memory, and must not be written to. A tensor that is stored in
        another order (a transposed one in a `.pt`) is copied as a whole.
        """
        try:
            return self._elements(name, first, count)
        except CheckpointError as error:
            raise type(error)(f"{self.path}: {error}") from error

    def window(self, parts: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Return `elements` of several parts (name, first, count).

        Parts that lie one behind the other in the file are mapped together.
        """
        try:
            return self._window(parts)
        except CheckpointError as error:
            raise type(error)(f"{self.path}: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, in the file's memory where it can be; see `elements`."""
        shape = self.entries[name].shape
        return self.elements(name, 0, math.prod(shape)).view(shape)

    def check(self) -> None:
        """Raise CheckpointError if the file is no longer what it was when it was opened.

        To be called after elements were used and before anybody relies on what was made of them.
        """
        same = self._look() == self._state and not self._damage
        if not same or parsed_sha256(self._file, self._index) != self._index.parsed_sha256:
            raise CheckpointError(f"{self.path}: changed while it was read")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._copy = None

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()

    def _elements(self, name: str, first: int, count: int) -> Tensor:
        (tensor,) = self._window([(name, first, count)])
        return tensor

    def _window(self, parts: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        tensors: list[Tensor] = []
        run: list[tuple[torch.dtype, int]] = []  # dtype and elements of what is mapped next
        begin = end = 0

        def map_run() -> None:
            if not run:
                return
            mapped = self._map(begin, end - begin)
            offset = 0
            for dtype, count in run:
                tensors.append(torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset))
                offset += count * dtype.itemsize
            run.clear()

        for name, first, count in parts:
            entry = self.entries[name]
            dtype: torch.dtype = getattr(torch, entry.dtype)
            place = self._place(entry) if count else None
            if place is None:
                map_run()
                whole = (
                    self._stored_otherwise(name, dtype) if count else torch.empty(0, dtype=dtype)
                )
                tensors.append(whole[first : first + count])
                continue
            here = place + first * dtype.itemsize
            if here != end:
                map_run()
            if not run:
                begin = here
            end = here + count * dtype.itemsize
            run.append((dtype, count))
        map_run()
        return tensors

    def _stored_otherwise(self, name: str, dtype: torch.dtype) -> Tensor:
        entry = self.entries[name]
        if self._copy is None or self._copy[0] != name:
            self._copy = None  # not two at a time
            self._copy = (name, self._copied(entry, dtype))
        return self._copy[1]

    def _map(self, offset: int, count: int) -> Any:
        try:
            return native.MappedBytes(self._file.descriptor, offset, count, self._damage)
        except OSError as error:
            raise CheckpointError(f"cannot be mapped: {error.strerror}") from error

    def _look(self) -> tuple[int, ...]:
        status = os.fstat(self._file.descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _place(self, entry: TensorEntry) -> int | None:
        """The tensor's first byte in the file, if its elements follow in row-major order."""
        if entry.conjugate or entry.negative:
            return None
        expected = 1
        for extent, stride in zip(reversed(entry.shape), reversed(entry.strides), strict=True):
            if extent != 1 and stride != expected:
                return None
            expected *= extent
        item = ITEM_SIZES[entry.dtype]
        span = self._index.storages[entry.storage]
        if (entry.offset + expected) * item > span.nbytes:
            return None  # for as_strided to refuse
        return span.offset + entry.offset * item

    def _copied(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        span = self._index.storages[entry.storage]
        item = ITEM_SIZES[entry.dtype]
        mapped = self._map(span.offset, span.nbytes // item * item)
        stored = torch.frombuffer(mapped, dtype=dtype)
        copy = stored.as_strided(entry.shape, entry.strides, entry.offset).reshape(-1).clone()
        copy = copy.conj().resolve_conj() if entry.conjugate else copy
        return copy.neg() if entry.negative else copy

    def _check_sums(self) -> None:
        spans: list[Span] = [*self._index.storages.values(), *self._index.others]
        for span in spans:
            if span.crc32 is None:
                continue
            crc = 0
            for begin in range(span.offset, span.offset + span.nbytes, _CHUNK):
                count = min(_CHUNK, span.offset + span.nbytes - begin)
                crc = zlib.crc32(self._map(begin, count), crc)
            if crc != span.crc32:
                raise CheckpointError(
                    f"is damaged: the record at byte {span.offset} has a wrong checksum"
                )
