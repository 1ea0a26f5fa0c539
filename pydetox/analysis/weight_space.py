"""Inner products, projections, sketches and sums of whole checkpoints that stay in their files.

    from pydetox.analysis import weight_space
    weight_space.cosine("base.safetensors", ["a.safetensors", "b.pt", "hf-hub:org/repo"])

A checkpoint is named as for `pydetox.checkpoints.load_checkpoint`. Its floating-point tensors
count, in any mixture of float16, bfloat16, float32 and float64. Integer buffers do not count. The
functions map the files and pass over them together, in steps of at most `memory` bytes of all
files. Memory therefore depends neither on their size nor on their number. Nothing in a file is
executed. A file that changes while it is read is an error.

The results have the bits of the operators in `pydetox.ops` on the tensors in the order of their
names, whatever `memory` and the number of threads are. Differences are computed in float64.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pydetox.atomic import atomic_file
from pydetox.checkpoints.index import quote
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.writing import safetensors_header
from pydetox.errors import CheckpointError, UsageError
from pydetox.ops import (
    apply_task_vectors,
    weight_diff_gram,
    weight_diff_project,
    weight_diff_sketch,
)
from pydetox.ops.weights import CHUNK, sketch_chunk
from pydetox.progress import Progress

from .walking import CheckpointName, Files

#: The default number of bytes that a step reads, of all files together.
MEMORY = 48 << 20

_DOUBLE = 8
# `apply` cuts tensors at multiples of this number of elements. Its results do not depend on the
# cuts.
_APPLY_UNIT = 4096


def gram(
    base: CheckpointName,
    models: Sequence[CheckpointName],
    *,
    memory: int = MEMORY,
    offline: bool = False,
) -> Tensor:
    """Return the inner products of M models' differences to a base.

    If two chunks of each model do not fit into `memory` (by default, with more than 63 models in
    float32), models are compared group by group and read several times.

    Args:
        base: The base checkpoint.
        models: M checkpoints with tensors of the same names and shapes.
        memory: The bytes of weights that are held at a time.
        offline: Whether to use only files on this machine.

    Returns:
        float64 [M, M], symmetric: entry (i, j) is <models[i] - base, models[j] - base>.

    Raises:
        ArchitectureError: The checkpoints do not have the same tensors; the message names them.
        CheckpointError: A file cannot be found or read, or changes while it is read.
    """
    result = torch.zeros(len(models), len(models), dtype=torch.float64)
    with Files([base, *models], offline) as files:
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
    base: CheckpointName,
    models: Sequence[CheckpointName],
    *,
    memory: int = MEMORY,
    offline: bool = False,
) -> Tensor:
    """Return the cosines of the angles between M models' differences to a base.

    The arguments and the other errors are those of `gram`.

    Returns:
        float64 [M, M], symmetric, ones on the diagonal.

    Raises:
        UsageError: a model does not differ from the base.
        CheckpointError: a difference is not finite, because of weights that are NaN or infinite.
    """
    products = gram(base, models, memory=memory, offline=offline)
    norms = products.diagonal().sqrt()
    for model, norm in zip(models, norms.tolist(), strict=True):
        if norm == 0:
            raise UsageError(
                f"{os.fspath(model)}: has the weights of the base {os.fspath(base)}; the cosine "
                "with a zero difference is not defined"
            )
        if not math.isfinite(norm):
            raise CheckpointError(
                f"{os.fspath(model)}: its difference to the base {os.fspath(base)} is {norm} long: "
                "one of the two has weights that are NaN, infinite or far too large"
            )
    cosines = products / norms[:, None] / norms
    cosines.fill_diagonal_(1.0)
    return cosines


def project(
    base: CheckpointName,
    model: CheckpointName,
    directions: Sequence[CheckpointName],
    *,
    memory: int = MEMORY,
    offline: bool = False,
) -> Tensor:
    """Return the inner products of a model's difference to a base with R directions.

    A direction is a file of tensors of the same names and shapes. It is used as it is; no base is
    subtracted from it (`gram` does that). If not all directions fit into `memory`, base and model
    are read again for each group of directions.

    Args:
        base: The base checkpoint.
        model: A checkpoint with tensors of the same names and shapes.
        directions: R files.
        memory: The bytes of weights that are held at a time.
        offline: Whether to use only files on this machine.

    Returns:
        float64 [R]: <model - base, directions[r]>.

    Raises:
        ArchitectureError: The files do not have the same tensors; the message names them.
        CheckpointError: A file cannot be found or read, or changes while it is read.
    """
    parts: list[Tensor] = [torch.zeros(0, dtype=torch.float64)]
    with Files([base, model, *directions], offline) as files:
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
    base: CheckpointName,
    model: CheckpointName,
    *,
    seed: int,
    size: int = 4096,
    memory: int = MEMORY,
    offline: bool = False,
) -> Tensor:
    """Return a random projection of a model's difference to a base to `size` numbers.

    Sketches of the same seed and size are comparable; `pydetox.ops.weight_diff_sketch` explains
    this and gives the error. A step holds at least 64 * size elements of both files. With a `size`
    above 65,536, this is more than the default `memory`.

    Args:
        base: The base checkpoint.
        model: A checkpoint with tensors of the same names and shapes.
        seed: The seed of the projection.
        size: A power of two, at least 64.
        memory: The bytes of weights that are held at a time.
        offline: Whether to use only files on this machine.

    Returns:
        float64 [size].

    Raises:
        ArchitectureError: The two do not have the same tensors; the message names them.
        CheckpointError: A file cannot be found or read, or changes while it is read.
        UsageError: `size` is no power of two of at least 64.
    """
    result = torch.zeros(max(size, 0), dtype=torch.float64)
    empty = torch.empty(0)
    weight_diff_sketch([empty], [empty], [""], seed=seed, size=size, start=result)  # checks size
    with (
        Files([base, model], offline) as files,
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
    base: CheckpointName,
    models: Sequence[CheckpointName],
    coefficients: Sequence[float],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    memory: int = MEMORY,
    offline: bool = False,
) -> Path:
    """Write base + sum over r of coefficients[r] * (models[r] - base), part by part.

    The sums are computed in float64 and rounded to the dtypes of the base. Integer buffers of the
    base are copied. The metadata of the file names the files that it was made of. Source: Ilharco
    et al., "Editing Models with Task Arithmetic" (ICLR 2023).

    Args:
        base: The base checkpoint.
        models: R checkpoints with tensors of the same names and shapes.
        coefficients: R numbers.
        path: The `.safetensors` file to write. It appears when it is complete.
        overwrite: Whether to replace an existing file.
        memory: The bytes of weights that are held at a time.
        offline: Whether to use only files on this machine.

    Returns:
        The path.

    Raises:
        ArchitectureError: the checkpoints do not have the same tensors; the message names them.
        CheckpointError: one cannot be found or read, or changes while it is read; or a sum is NaN
            or infinite in the base's dtype, such as beyond 65,504 in float16. Nothing is written.
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
    with Files([base, *models], offline) as files:
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
                    # Copy first: a part that vanished from a mapped file reads as zeros in a
                    # copy, but is an error in write().
                    whole = files.base.tensor(name).clone().reshape(-1).view(torch.uint8)
                    file.write(whole.numpy().data)
                    continue
                for step in files.walk(everybody, _APPLY_UNIT, written, memory, progress, [name]):
                    (result,) = apply_task_vectors(step.lists[0], step.lists, row)
                    for tensor in result:
                        _require_finite(tensor, name, base)
                        file.write(tensor.view(torch.uint8).numpy().data)
            files.base.check()
    return Path(path)


def _require_finite(part: Tensor, name: str, base: CheckpointName) -> None:
    """Raise CheckpointError for a part of a tensor that does not fit its dtype."""
    odd = int((~part.isfinite()).sum())
    if odd:
        dtype = str(part.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{os.fspath(base)}: tensor {quote(name)}: {odd} of its weights would be NaN or "
            f"infinite in {dtype}; take smaller coefficients=, or a base in a wider dtype without "
            "such weights"
        )
