"""Inner products, projections, sketches and sums of whole checkpoints that stay in their files.

    from pydetox.analysis import weight_space
    weight_space.cosine("base.safetensors", ["a.safetensors", "b.pt", "hf-hub:org/repo"])

A checkpoint is named as for `pydetox.checkpoints.load_checkpoint`. Its floating-point tensors
count, in float16, bfloat16, float32 or float64 and any mixture; integer buffers do not. The files
are mapped and walked through together, in steps of at most `memory` bytes of all of them: that, and
not their size or number, is what is held in memory. Nothing in a file is executed, and one that
changes while it is read is an error.

Results are those of the operators in `pydetox.ops` on the tensors in the order of their names, bit
for bit, whatever `memory` and the number of threads are. Differences are taken in float64.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pydetox.atomic import atomic_file
from pydetox.checkpoints.architecture import describe_mismatch
from pydetox.checkpoints.index import ITEM_SIZES, quote
from pydetox.checkpoints.mapped import MappedWeights
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.writing import safetensors_header
from pydetox.errors import ArchitectureError, CheckpointError, UsageError
from pydetox.ops import (
    apply_task_vectors,
    weight_diff_gram,
    weight_diff_project,
    weight_diff_sketch,
)
from pydetox.ops.weights import CHUNK, sketch_chunk
from pydetox.progress import Progress

Reference = str | os.PathLike[str]

#: Bytes that a step looks at, of all files together, unless told otherwise.
MEMORY = 48 << 20

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_DOUBLE = 8
_KEPT_OPEN = 128  # files: each takes a descriptor, and its index some 100 KB
_APPLY_UNIT = 4096  # elements; results do not depend on where tensors are cut


def gram(
    base: Reference, models: Sequence[Reference], *, memory: int = MEMORY, offline: bool = False
) -> Tensor:
    """Return the inner products of M models' differences to a base.

    Where two chunks of each do not fit into `memory` (by default, more than 63 models in float32),
    models are compared group by group, and read several times.

    Args:
        base: a checkpoint.
        models: M checkpoints with tensors of the same names and shapes.
        memory: bytes of weights to hold.
        offline: use only what is on this machine.

    Returns:
        float64 [M, M], symmetric: entry (i, j) is <models[i] - base, models[j] - base>.

    Raises:
        ArchitectureError: the checkpoints do not have the same tensors; the message names them.
        CheckpointError: one cannot be found or read, or changes while it is read.
    """
    result = torch.zeros(len(models), len(models), dtype=torch.float64)
    with _Files([base, *models], offline) as files:
        rows = range(1, len(models) + 1)
        most = max(2, files.at_once(memory) - 1)
        passes: list[tuple[int, ...]] = [tuple(rows)]
        if len(models) > most:
            groups = [rows[i : i + most // 2] for i in range(0, len(models), most // 2)]
            passes = [(*a, *b) for a, b in itertools.combinations(groups, 2)]
        with Progress("Comparing weights", files.mebibytes(len(p) + 1 for p in passes)) as progress:
            for members in passes:
                sums = torch.zeros(len(members), len(members), dtype=torch.float64)
                pairs = len(members) * (len(members) + 1) // 2
                for step in files.walk([0, *members], CHUNK, pairs * _DOUBLE, memory, progress):
                    sums = weight_diff_gram(step.lists[0], step.lists[1:], start=sums)
                places = torch.tensor(members, dtype=torch.int64) - 1
                result[places[:, None], places] = sums
    return result


def cosine(
    base: Reference, models: Sequence[Reference], *, memory: int = MEMORY, offline: bool = False
) -> Tensor:
    """Return the cosines of the angles between M models' differences to a base.

    Arguments and errors: as for `gram`.

    Returns:
        float64 [M, M], symmetric, ones on the diagonal.

    Raises:
        UsageError: a model does not differ from the base.
    """
    products = gram(base, models, memory=memory, offline=offline)
    norms = products.diagonal().sqrt()
    for model, norm in zip(models, norms.tolist(), strict=True):
        if norm == 0:
            raise UsageError(
                f"{os.fspath(model)}: has the weights of the base {os.fspath(base)}; the cosine "
                "with a zero difference is not defined"
            )
    cosines = products / norms[:, None] / norms
    cosines.fill_diagonal_(1.0)
    return cosines


def project(
    base: Reference,
    model: Reference,
    directions: Sequence[Reference],
    *,
    memory: int = MEMORY,
    offline: bool = False,
) -> Tensor:
    """Return the inner products of a model's difference to a base with R directions.

    A direction is a file of tensors of the same names and shapes, taken as it is: not a model of
    which a difference would be taken (that is `gram`). Where not all directions fit into `memory`,
    base and model are read again for each group of them.

    Args:
        base: a checkpoint.
        model: a checkpoint with tensors of the same names and shapes.
        directions: R files.
        memory: bytes of weights to hold.
        offline: use only what is on this machine.

    Returns:
        float64 [R]: <model - base, directions[r]>.

    Raises:
        ArchitectureError: the files do not have the same tensors; the message names them.
        CheckpointError: one cannot be found or read, or changes while it is read.
    """
    parts: list[Tensor] = [torch.zeros(0, dtype=torch.float64)]
    with _Files([base, model, *directions], offline) as files:
        rows = range(2, len(directions) + 2)
        most = max(1, files.at_once(memory) - 2)
        groups = [rows[i : i + most] for i in range(0, len(rows), most)]
        total = files.mebibytes(len(group) + 2 for group in groups)
        with Progress("Projecting weights", total) as progress:
            for group in groups:
                sums = torch.zeros(len(group), dtype=torch.float64)
                for step in files.walk(
                    [0, 1, *group], CHUNK, len(group) * _DOUBLE, memory, progress
                ):
                    start, end, *vectors = step.lists
                    sums = weight_diff_project(start, end, vectors, start=sums)
                parts.append(sums)
    return torch.cat(parts)


def sketch(
    base: Reference,
    model: Reference,
    *,
    seed: int,
    size: int = 4096,
    memory: int = MEMORY,
    offline: bool = False,
) -> Tensor:
    """Return a random projection of a model's difference to a base to `size` numbers.

    Sketches of the same seed and size compare: see `pydetox.ops.weight_diff_sketch`, also for the
    error. A step holds at least 64 * size elements of both, more than the default `memory` where
    `size` is larger than 65,536.

    Args:
        base: a checkpoint.
        model: a checkpoint with tensors of the same names and shapes.
        seed: of the projection.
        size: a power of two, at least 64.
        memory: bytes of weights to hold.
        offline: use only what is on this machine.

    Returns:
        float64 [size].

    Raises:
        ArchitectureError: the two do not have the same tensors; the message names them.
        CheckpointError: one cannot be found or read, or changes while it is read.
        UsageError: another size.
    """
    result = torch.zeros(max(size, 0), dtype=torch.float64)
    empty = torch.empty(0)
    weight_diff_sketch([empty], [empty], [""], seed=seed, size=size, start=result)  # checks size
    with (
        _Files([base, model], offline) as files,
        Progress("Sketching weights", files.mebibytes([2])) as progress,
    ):
        for step in files.walk([0, 1], sketch_chunk(size), size * _DOUBLE, memory, progress):
            start, end = step.lists
            result = weight_diff_sketch(
                start,
                end,
                [part.name for part in step.parts],
                seed=seed,
                size=size,
                first_elements=[part.first for part in step.parts],
                start=result,
            )
    return result


def apply(
    base: Reference,
    models: Sequence[Reference],
    coefficients: Sequence[float],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    memory: int = MEMORY,
    offline: bool = False,
) -> Path:
    """Write base + sum over r of coefficients[r] * (models[r] - base), part by part.

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023). Computed in float64
    and rounded to the dtypes of the base, whose integer buffers are taken over as they are. The
    file's metadata names what it was made of.

    Args:
        base: a checkpoint.
        models: R checkpoints with tensors of the same names and shapes.
        coefficients: R numbers.
        path: the file to write, `.safetensors`; it appears when it is complete.
        overwrite: replace an existing file.
        memory: bytes of weights to hold.
        offline: use only what is on this machine.

    Returns:
        The path.

    Raises:
        ArchitectureError: the checkpoints do not have the same tensors; the message names them.
        CheckpointError: one cannot be found or read, or changes while it is read.
        OutputError: the file exists or cannot be written.
        UsageError: another number of coefficients, one that is not finite, or another extension.
    """
    factors = [float(factor) for factor in coefficients]
    if len(factors) != len(models) or not all(map(math.isfinite, factors)):
        raise UsageError(f"coefficients must be {len(models)} finite numbers, found {factors}")
    if Path(path).suffix.lower() != ".safetensors":
        raise UsageError(f"{os.fspath(path)}: expected a name ending in .safetensors")
    recipe = Provenance(
        method="linear combination of weights",
        source_name=os.fspath(base),
        extra={"models": [os.fspath(model) for model in models], "coefficients": factors},
    )
    # base + sum of f * (m - base) = base - (sum of f) * base + sum of f * m.
    row = torch.tensor([[-math.fsum(factors), *factors]], dtype=torch.float64)
    everybody, written = range(len(models) + 1), _APPLY_UNIT * _DOUBLE
    with _Files([base, *models], offline) as files:
        entries = files.base.entries
        header, order = safetensors_header(
            {name: (entry.dtype, entry.shape) for name, entry in entries.items()},
            {"format": "pt", METADATA_KEY: recipe.to_json()},
        )
        total = files.mebibytes([len(models) + 1])
        with (
            atomic_file(path, overwrite=overwrite) as file,
            Progress("Writing weights", total) as progress,
        ):
            file.write(header)
            for name in order:
                if name not in files.names:
                    # A copy: what is gone from a file is zeros for us, but an error for write().
                    whole = files.base.tensor(name).clone().reshape(-1).view(torch.uint8)
                    file.write(whole.numpy().data)
                    continue
                for step in files.walk(everybody, _APPLY_UNIT, written, memory, progress, [name]):
                    (result,) = apply_task_vectors(step.lists[0], step.lists, row)
                    for tensor in result:
                        file.write(tensor.view(torch.uint8).numpy().data)
            files.base.check()
    return Path(path)


# ---- walking through files together -------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """`count` elements of a tensor, from `first` on."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class _Step:
    """Parts of tensors, and their elements in each file: lists[file][part], each [count]."""

    parts: list[_Part]
    lists: list[list[Tensor]]


class _Files:
    """Files with the same tensors, the first of which is the base; checked before anything else."""

    def __init__(self, references: Sequence[Reference], offline: bool) -> None:
        self._references = references
        self._offline = offline
        self._identities: list[tuple[int, ...]] = []
        self._open: dict[int, MappedWeights] = {}
        self._bytes: dict[str, int] = {}  # of one element, in the file that has it widest
        with ExitStack() as stack:
            stack.callback(self.close)
            for i in range(len(references)):
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
                if i > 0 and len(references) > _KEPT_OPEN:
                    self._release(i)
            stack.pop_all()

    def at_once(self, memory: int) -> int:
        """How many files may be walked through together, with a chunk for each of two threads."""
        return memory // (2 * CHUNK * max(self._bytes.values()))

    def mebibytes(self, files: Iterable[int]) -> float:
        """What passes over so many files read, about; for a bar of progress."""
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
    ) -> Iterator[_Step]:
        """Yield all elements of some files, in steps; then check that the files are as they were.

        Args:
            members: which files, as they are numbered in the constructor.
            unit: elements; tensors are cut at its multiples alone.
            unit_bytes: what a unit takes besides its elements: for sums, or results.
            memory: bytes for the elements and the sums of a step. One unit is held in any case.
            progress: counts mebibytes.
            names: which tensors, in this order; None for all that are floating-point.
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

        for parts in _steps(counts, width, unit, unit_bytes, memory):
            places = [(part.name, part.first, part.count) for part in parts]
            lists = [weights.window(places) for weights in opened]
            yield _Step(parts, lists)
            for tensors in lists:
                tensors.clear()  # also in the hands of others: memory is freed before the next step
            progress.update(sum(part.count * width[part.name] for part in parts) / 2**20)
        for weights in opened:
            weights.check()
        if len(self._references) > _KEPT_OPEN:
            for i in list(self._open)[1:]:
                self._release(i)

    def close(self) -> None:
        for i in list(self._open):
            self._release(i)

    def __enter__(self) -> _Files:
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
            weights = MappedWeights(self._references[i], offline=self._offline)
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
            if dtype not in _DTYPES:
                raise ArchitectureError(
                    f"{weights.path}: tensor {quote(name)} is {dtype}, expected "
                    f"{', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}"
                )
            self._bytes[name] = max(self._bytes.get(name, 0), ITEM_SIZES[dtype])


def _steps(
    counts: dict[str, int], width: dict[str, int], unit: int, unit_bytes: int, memory: int
) -> Iterator[list[_Part]]:
    """Cut tensors at multiples of `unit` into steps that take at most `memory`, or one unit.

    counts: name to elements. width: name to bytes of one element, in all files. unit_bytes: what a
    unit takes besides.
    """
    step: list[_Part] = []
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
            part = _Part(name, first, min(fitting, rest))
            step.append(part)
            left -= part.count * width[name] + -(-part.count // unit) * unit_bytes
            first += part.count
    if step:
        yield step
