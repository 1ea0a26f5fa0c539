"""Operators over the weights of whole models: inner products, projections, sketches, combinations.

A model is a list of tensors, as the values of a state dict: float16, bfloat16, float32 and float64
in any mixture, of any shape and stride (a tensor that is not contiguous is copied, that one alone).
Several models are several lists of the same tensors. What is computed from a model is computed from
its difference to a base, element by element and in float64; the difference itself is never stored.
Sums are in float64 as well, in an order that depends on neither threads nor instruction set: the
same call gives the same bits. Native kernels: csrc/cpu/weights_kernels.cpp and csrc/cuda; plain
PyTorch: `pydetox.ops.reference`.

Models that do not fit into memory come in parts (on the CPU): a call goes on from an earlier one's
result, `start`. Where the tensors come in the same order and are cut only at multiples of `CHUNK`
elements, of a sketch at multiples of 64 times its size, that gives the bits of a single call, in
which sums are added up in the same places and in the same order. `pydetox.weight_space` does this
for files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import _library  # noqa: F401  loads the operators registered below

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALLEST_SKETCH = 64
#: Elements that are summed apart from all others: kChunk of csrc/core/weights.h.
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
    _check("weight_diff_gram", base, {f"models[{i}]": m for i, m in enumerate(models)})
    _check_start("weight_diff_gram", start, (len(models), len(models)))
    gram: Tensor = torch.ops.pydetox.weight_diff_gram.default(
        list(base), _joined(models), len(models), start
    )
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
    lists = {"model": model, **{f"directions[{i}]": d for i, d in enumerate(directions)}}
    _check("weight_diff_project", base, lists)
    _check_start("weight_diff_project", start, (len(directions),))
    projection: Tensor = torch.ops.pydetox.weight_diff_project.default(
        list(base), list(model), _joined(directions), len(directions), start
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
    _check("weight_diff_sketch", base, {"model": model})
    if len(names) != len(base) or len(set(names)) != len(names):
        raise UsageError(
            f"weight_diff_sketch: names must be {len(base)} different ones, found {len(names)}, "
            f"{len(set(names))} different"
        )
    if size < _SMALLEST_SKETCH or size & (size - 1):
        raise UsageError(
            f"weight_diff_sketch: size must be a power of two, at least {_SMALLEST_SKETCH}, "
            f"found {size}"
        )
    _check_start("weight_diff_sketch", start, (size,))
    if first_elements is not None:
        step = sketch_chunk(size)
        wrong = [first for first in first_elements if first < 0 or first % step]
        if wrong or len(first_elements) != len(base):
            raise UsageError(
                f"weight_diff_sketch: first_elements must be {len(base)} multiples of {step}, "
                f"found {list(first_elements)}"
            )
    # Sums are rounded: only a fixed order makes the bits independent of the lists' order.
    order = sorted(range(len(names)), key=lambda i: names[i])
    sketch: Tensor = torch.ops.pydetox.weight_diff_sketch.default(
        [base[i] for i in order],
        [model[i] for i in order],
        [sketch_key(seed, names[i]) for i in order],
        size,
        None if first_elements is None else [first_elements[i] // size for i in order],
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
    _check(name, base, {f"vectors[{i}]": v for i, v in enumerate(vectors)})
    rows = torch.as_tensor(coefficients, dtype=torch.float64)
    shapes = ((len(vectors),), (len(vectors), len(base)))
    if rows.ndim not in (2, 3) or tuple(rows.shape[1:]) not in shapes:
        raise UsageError(
            f"{name}: coefficients must be [M, {len(vectors)}] or [M, {len(vectors)}, "
            f"{len(base)}], found {list(rows.shape)}"
        )
    if out is None:
        out = [
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in base] for _ in rows
        ]
    if len(out) != len(rows):
        raise UsageError(f"{name}: out must be {len(rows)} lists, found {len(out)}")
    _check(name, base, {f"out[{i}]": o for i, o in enumerate(out)}, results=True)
    torch.ops.pydetox.apply_task_vectors.default(
        [t.detach() for t in base],
        [t.detach() for t in _joined(vectors)],
        rows.to(base[0].device).contiguous(),
        [t.detach() for t in _joined(out)],
    )
    return [list(tensors) for tensors in out]


def _check_start(operator: str, start: Tensor | None, shape: tuple[int, ...]) -> None:
    if start is None:
        return
    fits = start.shape == shape and start.dtype == torch.float64 and start.device.type == "cpu"
    if not fits or not start.is_contiguous():
        raise UsageError(
            f"{operator}: start must be contiguous float64 {list(shape)} on the CPU, found "
            f"{start.dtype} {list(start.shape)} on {start.device}"
        )


def _joined(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]


def _check(
    operator: str,
    base: Sequence[Tensor],
    lists: dict[str, Sequence[Tensor]],
    *,
    results: bool = False,
) -> None:
    if not base:
        raise UsageError(f"{operator}: base must hold at least one tensor")
    for name, tensors in {"base": base, **lists}.items():
        if len(tensors) != len(base):
            raise UsageError(
                f"{operator}: {name} must hold {len(base)} tensors as base does, "
                f"found {len(tensors)}"
            )
        for i, (tensor, expected) in enumerate(zip(tensors, base, strict=True)):
            if tensor.shape != expected.shape:
                raise UsageError(
                    f"{operator}: {name}[{i}] must be {list(expected.shape)} as base[{i}] is, "
                    f"found {list(tensor.shape)}"
                )
            if tensor.dtype not in _DTYPES:
                raise UsageError(
                    f"{operator}: {name}[{i}] must be float16, bfloat16, float32 or float64, "
                    f"found {tensor.dtype}"
                )
            if tensor.device != base[0].device:
                raise UsageError(
                    f"{operator}: {name}[{i}] must be on {base[0].device} as base[0] is, "
                    f"found {tensor.device}"
                )
            if results and name != "base" and not tensor.is_contiguous():
                raise UsageError(
                    f"{operator}: {name}[{i}] must be contiguous, found strides {tensor.stride()}"
                )


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
    lambda base, model, keys, size, first_blocks=None, start=None: base[0].new_empty(
        (size,), dtype=torch.float64
    ),
)
torch.library.register_fake("pydetox::apply_task_vectors", lambda *_: None)
