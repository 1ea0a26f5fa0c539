"""Iterating over several files with the same tensors together, in bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from ..checkpoints.architecture import describe_mismatch
from ..checkpoints.index import ITEM_SIZES, quote
from ..checkpoints.mapped import MappedWeights
from ..errors import ArchitectureError, CheckpointError
from ..ops.weights import CHUNK
from ..progress import Progress

#: The name of a checkpoint, as for `pydetox.checkpoints.load_checkpoint`.
CheckpointName = str | os.PathLike[str]

#: Dtypes of the weights that can be computed with.
DTYPES = ("float16", "bfloat16", "float32", "float64")

# The number of files that stay open. Each takes a descriptor, and its index some 100 KB.
KEPT_OPEN = 128


@dataclass(frozen=True)
class Part:
    """`count` consecutive elements of a tensor; the first of them has the index `first`."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Step:
    """Parts of tensors with their elements in each file: lists[file][part] is a tensor [count]."""

    parts: list[Part]
    lists: list[list[Tensor]]


class Files:
    """Files with the same tensors. The first one is the base. They are checked when opened."""

    def __init__(self, names: Sequence[CheckpointName], offline: bool) -> None:
        self._checkpoints = names
        self._offline = offline
        self._identities: list[tuple[int, ...]] = []
        self._open: dict[int, MappedWeights] = {}
        self._bytes: dict[str, int] = {}  # of one element, in the file that has it widest
        with ExitStack() as stack:
            stack.callback(self.close)
            for i in range(len(names)):
                weights = self._opened(i)
                if i == 0:
                    self.base = weights
                    self.names = sorted(
                        name
                        for name, entry in weights.entries.items()
                        if "float" in entry.dtype  # as Tensor.is_floating_point
                    )
                    if not self.names:
                        raise ArchitectureError(f"{weights.path}: holds no floating-point weights")
                self._check(weights)
                if i > 0 and len(names) > KEPT_OPEN:
                    self._release(i)
            stack.pop_all()

    def at_once(self, memory: int) -> int:
        """Return how many files fit into memory together, with a chunk for each of two threads."""
        return memory // (2 * CHUNK * max(self._bytes.values()))

    def mebibytes(self, files: Iterable[int]) -> float:
        """Return about how many MiB some passes over the files read, for a progress bar."""
        each = sum(math.prod(self.base.entries[n].shape) * self._bytes[n] for n in self.names)
        return math.ceil(sum(files) * each / 2**20)

    def walk(
        self,
        members: Iterable[int],
        unit: int,
        unit_bytes: int,
        memory: int,
        progress: Progress,
        names: Sequence[str] | None = None,
    ) -> Iterator[Step]:
        """Yield all elements of some files, in steps; then check that no file has changed.

        Args:
            members: The indices of the files, in the order of the constructor.
            unit: A number of elements. Tensors are cut only at multiples of it.
            unit_bytes: The bytes that a unit takes besides its elements, for sums or results.
            memory: The bytes for the elements and the sums of a step. A step holds at least one
                unit.
            progress: The progress bar; it counts MiB.
            names: The names of the tensors, in order; None for all floating-point tensors.
        """
        opened = [self._opened(i) for i in members]
        counts = {
            name: math.prod(self.base.entries[name].shape)
            for name in (self.names if names is None else names)
        }
        width = {
            name: sum(ITEM_SIZES[weights.entries[name].dtype] for weights in opened)
            for name in counts
        }

        for parts in steps(counts, width, unit, unit_bytes, memory):
            places = [(part.name, part.first, part.count) for part in parts]
            lists = [weights.window(places) for weights in opened]
            yield Step(parts, lists)
            for tensors in lists:
                # The caller's references go, too, so that memory is freed before the next step.
                tensors.clear()
            progress.update(sum(part.count * width[part.name] for part in parts) / 2**20)
        for weights in opened:
            weights.check()
        if len(self._checkpoints) > KEPT_OPEN:
            for i in list(self._open)[1:]:
                self._release(i)

    def close(self) -> None:
        """Close all files."""
        for i in list(self._open):
            self._release(i)

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _opened(self, i: int) -> MappedWeights:
        if i not in self._open:
            weights = MappedWeights(self._checkpoints[i], offline=self._offline)
            self._open[i] = weights
            if i == len(self._identities):
                self._identities.append(weights.identity)
            elif weights.identity != self._identities[i]:
                raise CheckpointError(f"{weights.path}: changed while it was read")
        return self._open[i]

    def _release(self, i: int) -> None:
        self._open.pop(i).close()

    def _check(self, weights: MappedWeights) -> None:
        mismatch = describe_mismatch(self.base.shapes, weights.shapes)
        if mismatch is not None:
            raise ArchitectureError(
                f"{weights.path}: does not have the tensors of {self.base.path}: {mismatch}"
            )
        for name in self.names:
            dtype = weights.entries[name].dtype
            if dtype not in DTYPES:
                raise ArchitectureError(
                    f"{weights.path}: tensor {quote(name)} is {dtype}, expected "
                    f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
                )
            self._bytes[name] = max(self._bytes.get(name, 0), ITEM_SIZES[dtype])


def steps(
    counts: dict[str, int], width: dict[str, int], unit: int, unit_bytes: int, memory: int
) -> Iterator[list[Part]]:
    """Cut tensors at multiples of `unit` into steps that take at most `memory`, or one unit.

    counts: The number of elements of each tensor. width: The bytes of one element of each tensor in
    all files together. unit_bytes: The bytes that a unit takes besides its elements.
    """
    step: list[Part] = []
    left = memory
    for name, count in counts.items():
        first = 0
        while first < count:
            fitting = max(left, 0) // (unit * width[name] + unit_bytes) * unit
            rest = count - first
            if (rest * width[name] + -(-rest // unit) * unit_bytes) <= left:
                fitting = rest
            if fitting == 0:
                if step:
                    yield step
                    step, left = [], memory
                    continue
                fitting = unit
            part = Part(name, first, min(fitting, rest))
            step.append(part)
            left -= part.count * width[name] + -(-part.count // unit) * unit_bytes
            first += part.count
    if step:
        yield step
