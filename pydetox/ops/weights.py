"""Operators over the weights of whole models: products, projections, sketches, combinations.

A model is a list of tensors, as the values of a state dict: float16, bfloat16, float32 and float64
in any mixture, of any shape and stride (a tensor that is not contiguous is copied, that one alone).
Several models are several lists of the same tensors. What is computed from a model is computed from
its difference to a base, element by element and in float64; the difference itself is never stored.
Sums are in float64 as well, in an order that depends on neither threads nor instruction set: the
same call gives the same bits. Native kernels and the checks of arguments: csrc/weights and
csrc/weight_matmul; plain PyTorch: `pydetox.ops.reference`.

Models that do not fit into memory come in parts (on the CPU): a call goes on from an earlier one's
result, `start`. Where the tensors come in the same order and are cut only at multiples of `CHUNK`
elements, of a sketch at multiples of 64 times its size, that gives the bits of a single call, in
which sums are added up in the same places and in the same order. `pydetox.analysis.weight_space`
does this for files.
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

#: Elements that are summed apart from all others: kChunk of csrc/weights/core.h.
CHUNK = 65536


def weight_diff_gram(
    base: Sequence[Tensor],
    models: Sequence[Sequence[Tensor]],
    *,
    start: Tensor | None = None,
) -> Tensor:
    """Return all inner products of M models' differences to a base: norms, angles, a Gram matrix.

    Every weight is read once, whatever M is (on CUDA: once for every eight models).

    Args:
        base: n tensors.
        models: M lists of tensors of the same shapes.
        start: the result of the parts before these, to go on from.

    Returns:
        float64 [M, M], symmetric: entry (i, j) is <models[i] - base, models[j] - base>.

    Raises:
        UsageError: lists of different lengths, shapes or devices, integer tensors, or a start of
            another shape, dtype or device.
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
        start: the result of the parts before these, to go on from.

    Returns:
        float64 [R]: <model - base, directions[r]>.

    Raises:
        UsageError: lists of different lengths, shapes or devices, integer tensors, or a start of
            another shape, dtype or device.
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

    The projection S is defined by the seed, the tensors' names and the places of their elements,
    so that sketches made on different machines and devices, and from files in another order, can
    be compared: <Sx, Sy> estimates <x, y> without bias, with a variance of at most
    (|x|^2 |y|^2 + <x, y>^2) / size. It is a count sketch (Charikar, Chen, Farach-Colton, "Finding
    frequent items in data streams", 2002; for inner products: Weinberger et al., "Feature hashing
    for large scale multitask learning", ICML 2009) whose hash keeps blocks of `size` neighbouring
    elements together and rotates them: docs/ops.md has the proof.

    Args:
        base: n tensors.
        model: n tensors of the same shapes.
        names: n different names.
        seed: of the projection.
        size: a power of two, at least 64.
        first_elements: where, in the tensors of these names, the parts given here begin: multiples
            of 64 * size. None for whole tensors.
        start: the result of the parts before these, to go on from.

    Returns:
        float64 [size].

    Raises:
        UsageError: lists of different lengths, shapes or devices, integer tensors, names that
            repeat, another size, parts that begin elsewhere, or a start of another shape, dtype or
            device.
    """
    name = "weight_diff_sketch"
    if len(names) != len(base) or len(set(names)) != len(names):
        raise UsageError(
            f"{name}: names must be {len(base)} different ones, found {len(names)}, "
            f"{len(set(names))} different"
        )
    if len(model) != len(base) or len(first_elements or names) != len(base):
        # They are put into another order first, which needs one of each.
        raise UsageError(
            f"{name}: model and first_elements must be {len(base)} as base is, found {len(model)} "
            f"and {len(first_elements or names)}"
        )
    # Sums are rounded: only a fixed order makes the bits independent of the lists' order.
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
    """Return the number of elements that a sketch adds up apart from all others."""
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

    A tensor [m, ...] counts as the matrix [m, n] of its rows, n the product of the dimensions after
    the first: a convolution's weight has a row for each output channel, a bias [m] is one column.
    What a randomised SVD is made of (Halko, Martinsson and Tropp, "Finding structure with
    randomness", SIAM Review 2011, section 4): `pydetox.analysis.spectra` has one.

    Products are added up in runs of 64, and the runs in order, so that the CPU and CUDA give the
    same bits.

    Args:
        base: tensors of at least one dimension.
        model: tensors of the same shapes.
        factors: one matrix F for each tensor, of a width r of its own, in any floating dtype of
            the above: [n, r], for the left side [m, r].
        side: "right": D F. "left": F^T D.

    Returns:
        For each tensor float64 [m, r], for the left side [r, n].

    Raises:
        UsageError: lists of different lengths, shapes or devices, integer tensors, tensors without
            a dimension, factors of another shape, or another side.
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

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023). Computed in float64
    and rounded once, to the dtype of the result.

    Args:
        base: n tensors.
        vectors: R lists of tensors of the same shapes.
        coefficients: [M, R], or [M, R, n] for coefficients per tensor.
        out: M lists of contiguous tensors of the same shapes, to write to; the base itself may be
            one of them, apart from that they must not share memory with anything. Default: new
            tensors of the base's dtypes.

    Returns:
        `out`, or M new lists.

    Raises:
        UsageError: lists of different lengths, shapes or devices, integer tensors, coefficients of
            another shape, or results that cannot be written to.
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
    """Put lists of `count` tensors one after the other, which is how the operators take them."""
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
