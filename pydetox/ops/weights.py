"""Operators over the weights of whole models: products, projections, sketches, combinations.

A model is a list of tensors, such as the values of a state dict. The tensors may mix float16,
bfloat16, float32 and float64, and may have any shape and stride. (An operator copies a tensor that
is not contiguous, and no other.) Several models are several lists of the same tensors.

All operators work on the difference between a model and a base. They compute it element by element
in float64 and never store it. They sum in float64, too, in an order that depends neither on the
number of threads nor on the instruction set: the same call gives the same bits. The native kernels
and the checks of arguments are in csrc/weights and csrc/weight_matmul. `pydetox.ops.reference`
defines the operators in plain PyTorch.

Models that do not fit into memory can be passed in parts (on the CPU). Each call then continues
from the result of the call before, `start`. This gives the bits of a single call if the tensors
come in the same order and are cut only at multiples of `CHUNK` elements (for a sketch, at multiples
of 64 times its size). `pydetox.analysis.weight_space` does this for files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import _library

#: The number of elements that have a partial sum of their own: kChunk of csrc/weights/core.h.
CHUNK = 65536


def weight_diff_gram(
    base: Sequence[Tensor],
    models: Sequence[Sequence[Tensor]],
    *,
    start: Tensor | None = None,
) -> Tensor:
    """Return the Gram matrix of M models' differences to a base.

    Every weight is read once, whatever M is (on CUDA: once for every eight models).

    Args:
        base: n tensors.
        models: M lists of tensors of the same shapes.
        start: the result of the call on the parts before these; None for the first part.

    Returns:
        float64 [M, M], symmetric: entry (i, j) is <models[i] - base, models[j] - base>.

    Raises:
        UsageError: The lists have different lengths, shapes or devices, a tensor has an integer
            dtype, or `start` has another shape, dtype or device.
    """
    name = "weight_diff_gram"
    joined = _joined(name, "models", models, len(base))
    gram: Tensor = _library.call(name, list(base), joined, len(models), start)
    return gram


def weight_diff_project(
    base: Sequence[Tensor],
    model: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    *,
    start: Tensor | None = None,
) -> Tensor:
    """Return the inner products of one difference with R directions in weight space.

    Args:
        base: n tensors.
        model: n tensors of the same shapes.
        directions: R lists of tensors of the same shapes.
        start: the result of the call on the parts before these; None for the first part.

    Returns:
        float64 [R]: <model - base, directions[r]>.

    Raises:
        UsageError: The lists have different lengths, shapes or devices, a tensor has an integer
            dtype, or `start` has another shape, dtype or device.
    """
    name = "weight_diff_project"
    joined = _joined(name, "directions", directions, len(base))
    projection: Tensor = _library.call(
        name, list(base), list(model), joined, len(directions), start
    )
    return projection


def weight_diff_sketch(
    base: Sequence[Tensor],
    model: Sequence[Tensor],
    names: Sequence[str],
    *,
    seed: int,
    size: int = 4096,
    first_elements: Sequence[int] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return a random projection of a difference to `size` numbers.

    The seed, the tensors' names and the places of their elements define the projection S. Sketches
    are therefore comparable across machines, devices and files in another order. <Sx, Sy> estimates
    <x, y> without bias, with a variance of at most (|x|^2 |y|^2 + <x, y>^2) / size; docs/ops.md has
    the proof.

    S is a count sketch (Charikar, Chen, Farach-Colton, "Finding frequent items in data streams",
    2002; for inner products: Weinberger et al., "Feature hashing for large scale multitask
    learning", ICML 2009). Its hash keeps blocks of `size` neighbouring elements together and
    rotates them.

    Args:
        base: n tensors.
        model: n tensors of the same shapes.
        names: n different names.
        seed: the seed of the projection.
        size: a power of two, at least 64.
        first_elements: the index, within each named tensor, of the first element that is given
            here: a multiple of 64 * size. None if the tensors are whole.
        start: the result of the call on the parts before these; None for the first part.

    Returns:
        float64 [size].

    Raises:
        UsageError: The lists have different lengths, shapes or devices, a tensor has an integer
            dtype, names repeat, `size` is out of range, a part begins at another index, or `start`
            has another shape, dtype or device.
    """
    name = "weight_diff_sketch"
    if len(names) != len(base) or len(set(names)) != len(names):
        raise UsageError(
            f"{name}: names must be {len(base)} different ones, found {len(names)}, "
            f"{len(set(names))} different"
        )
    if len(model) != len(base) or len(first_elements or names) != len(base):
        # The tensors are sorted by name below, which needs one tensor per name.
        raise UsageError(
            f"{name}: model and first_elements must be {len(base)} as base is, found {len(model)} "
            f"and {len(first_elements or names)}"
        )
    # Sums are rounded. A fixed order makes the bits independent of the order of the lists.
    order = sorted(range(len(names)), key=lambda i: names[i])
    sketch: Tensor = _library.call(
        name,
        [base[i] for i in order],
        [model[i] for i in order],
        [sketch_key(seed, names[i]) for i in order],
        size,
        None if first_elements is None else [first_elements[i] for i in order],
        start,
    )
    return sketch


def sketch_chunk(size: int) -> int:
    """Return the number of elements that have a partial sum of their own in a sketch."""
    return 64 * size


def sketch_key(seed: int, name: str) -> int:
    """Return the key of a tensor's random numbers: a signed 64-bit integer."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def weight_diff_matmul(
    base: Sequence[Tensor],
    model: Sequence[Tensor],
    factors: Sequence[Tensor],
    *,
    side: Literal["right", "left"] = "right",
) -> list[Tensor]:
    """Multiply every tensor's difference, as a matrix D = model - base, by a thin matrix.

    A tensor [m, ...] counts as a matrix [m, n], where n is the product of the dimensions after the
    first. A convolution's weight has one row per output channel, and a bias [m] is one column. A
    randomised SVD consists of such products (Halko, Martinsson and Tropp, "Finding structure with
    randomness", SIAM Review 2011, section 4); `pydetox.analysis.spectra` has one.

    Products are summed in runs of 64, and then the runs in order, so that the CPU and CUDA give
    the same bits.

    Args:
        base: tensors of at least one dimension.
        model: tensors of the same shapes.
        factors: one matrix F per tensor, [n, r] for the right side and [m, r] for the left one.
            The width r may differ between tensors, and so may the floating-point dtype.
        side: "right" for D F, "left" for F^T D.

    Returns:
        One float64 matrix per tensor: [m, r] for the right side, [r, n] for the left one.

    Raises:
        UsageError: The lists have different lengths, shapes or devices, a tensor has an integer
            dtype or no dimension, a factor has another shape, or `side` is unknown.
    """
    name = "weight_diff_matmul"
    if side not in ("right", "left"):
        raise UsageError(f"{name}: side must be 'right' or 'left', found {side!r}")
    wide = [f.to(torch.float64) if f.is_floating_point() else f for f in factors]
    products: list[Tensor] = _library.call(name, list(base), list(model), wide, side == "left")
    return products


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """Return rows and columns of a tensor [m, ...] as `weight_diff_matmul` takes it."""
    return tensor.shape[0], math.prod(tensor.shape[1:])


def apply_task_vectors(
    base: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    coefficients: Tensor | Sequence[Sequence[float]],
    *,
    out: Sequence[Sequence[Tensor]] | None = None,
) -> list[list[Tensor]]:
    """Return base + sum over r of coefficients[m, r] * vectors[r], for M rows m in one pass.

    The sums are computed in float64 and rounded once, to the dtype of the result. Source: Ilharco
    et al., "Editing Models with Task Arithmetic" (ICLR 2023).

    Args:
        base: n tensors.
        vectors: R lists of tensors of the same shapes.
        coefficients: [M, R], or [M, R, n] for coefficients per tensor.
        out: M lists of contiguous tensors of the same shapes to write to. The base itself may be
            one of them; otherwise they must not share memory with anything. Default: new tensors of
            the base's dtypes.

    Returns:
        `out`, or M new lists.

    Raises:
        UsageError: The lists have different lengths, shapes or devices, a tensor has an integer
            dtype, the coefficients have another shape, or `out` cannot be written to.
    """
    name = "apply_task_vectors"
    rows = torch.as_tensor(coefficients, dtype=torch.float64)
    if base:
        rows = rows.to(base[0].device)
    if out is None:
        out = [
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in base]
            for _ in range(rows.shape[0] if rows.ndim else 0)
        ]
    _library.call(
        name,
        [t.detach() for t in base],
        [t.detach() for t in _joined(name, "vectors", vectors, len(base))],
        rows.contiguous(),
        [t.detach() for t in _joined(name, "out", out, len(base))],
    )
    return [list(tensors) for tensors in out]


def _joined(
    operator: str, name: str, lists: Sequence[Sequence[Tensor]], count: int
) -> list[Tensor]:
    """Concatenate lists of `count` tensors; the operators take one flat list."""
    for i, tensors in enumerate(lists):
        if len(tensors) != count:  # nobody can tell afterwards
            raise UsageError(
                f"{operator}: {name}[{i}] must hold {count} tensors as base does, "
                f"found {len(tensors)}"
            )
    return [tensor for tensors in lists for tensor in tensors]


torch.library.register_fake(
    "pydetox::weight_diff_gram",
    lambda base, models, count, start=None: base[0].new_empty((count, count), dtype=torch.float64),
)
torch.library.register_fake(
    "pydetox::weight_diff_project",
    lambda base, model, directions, count, start=None: base[0].new_empty(
        (count,), dtype=torch.float64
    ),
)
torch.library.register_fake(
    "pydetox::weight_diff_sketch",
    lambda base, model, keys, size, first_elements=None, start=None: base[0].new_empty(
        (size,), dtype=torch.float64
    ),
)


def _fake_matmul(
    base: list[Tensor], model: list[Tensor], factors: list[Tensor], left: bool
) -> list[Tensor]:
    shapes = [(*matrix_shape(tensor), f.shape[1]) for tensor, f in zip(base, factors, strict=True)]
    return [
        tensor.new_empty((width, columns) if left else (rows, width), dtype=torch.float64)
        for tensor, (rows, columns, width) in zip(base, shapes, strict=True)
    ]


torch.library.register_fake("pydetox::weight_diff_matmul", _fake_matmul)
torch.library.register_fake("pydetox::apply_task_vectors", lambda *_: None)
