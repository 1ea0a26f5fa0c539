"""Attention of a frozen tower: the choice of its kernel, and its gradient in one tensor.

torch's `scaled_dot_product_attention` chooses a kernel anew in every call. Its backward pass gives
three gradients. autograd writes each of them into zeros for all three, adds these up, and copies
the sum once more, into the layout that the projection before it needs. Here the kernel is chosen
once for a tower, and the gradient of all three is written into that layout, [N, tokens, 3, heads,
d], at once.

On CUDA, the kernel is FlashAttention (Dao, arXiv 2307.08691) in half precision, and torch's
memory-efficient kernel in float32. cuDNN's is never used, because its plans are made anew for every
batch size. A kernel is compared with plain products before it is used, once for each device, dtype
and size of a head. If it cannot be called or is wrong, torch's own function takes its place, and
the tower's description says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..errors import is_out_of_memory, one_line

_aten = torch.ops.aten

#: The largest error of a kernel in the trial, relative to plain products in float64.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# The kernels that torch may choose from if none of ours fits.
_ALLOWED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Kernel(Protocol):
    """softmax(q k^T / sqrt(d)) v, and its gradients, on tensors [N, tokens, heads, d]."""

    @property
    def name(self) -> str:
        """What a report calls it."""
        ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Return what is mixed, [N, queries, heads, d], and what the backward pass needs of it."""
        ...

    def backward(
        self,
        gradient: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        mixed: Tensor,
        kept: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value, shaped like them."""
        ...


class _Flash:
    """FlashAttention on CUDA, for half precision."""

    name = "FlashAttention"

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        found = _aten._scaled_dot_product_flash_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        mixed, logsumexp, starts, other_starts, longest, other_longest, seed, offset, _ = found
        return mixed.transpose(1, 2), (
            logsumexp,
            starts,
            other_starts,
            seed,
            offset,
            longest,
            other_longest,
        )

    def backward(
        self,
        gradient: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        mixed: Tensor,
        kept: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        logsumexp, starts, other_starts, seed, offset, longest, other_longest = kept
        found = _aten._scaled_dot_product_flash_attention_backward(
            gradient.transpose(1, 2),
            *(part.transpose(1, 2) for part in parts),
            mixed.transpose(1, 2),
            logsumexp,
            starts,
            other_starts,
            longest,
            other_longest,
            0.0,
            False,
            seed,
            offset,
        )
        return found[0].transpose(1, 2), found[1].transpose(1, 2), found[2].transpose(1, 2)


class _FlashOnCpu:
    """torch's FlashAttention for CPUs."""

    name = "FlashAttention for CPUs"

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        mixed, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return mixed.transpose(1, 2), (logsumexp,)

    def backward(
        self,
        gradient: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        mixed: Tensor,
        kept: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient.transpose(1, 2),
            *(part.transpose(1, 2) for part in parts),
            mixed.transpose(1, 2),
            *kept,
            0.0,
            False,
        )
        return found[0].transpose(1, 2), found[1].transpose(1, 2), found[2].transpose(1, 2)


class _Efficient:
    """torch's memory-efficient attention on CUDA, for float32."""

    name = "memory-efficient attention"

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        # In the order of the arguments: no bias, no lengths, no dropout, no mask, the logsumexp.
        mixed, logsumexp, seed, offset, longest, other_longest = _aten._efficient_attention_forward(
            query, key, value, None, None, None, None, None, 0.0, 0, True
        )
        return mixed, (logsumexp, seed, offset, longest, other_longest)

    def backward(
        self,
        gradient: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        mixed: Tensor,
        kept: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        logsumexp, seed, offset, longest, other_longest = kept
        # Where all three have equal sizes they can be written side by side at once.
        together = parts[0].shape == parts[1].shape
        query, key, value, _ = _aten._efficient_attention_backward(
            gradient,
            *parts,
            None,
            mixed,
            None,
            None,
            longest,
            other_longest,
            logsumexp,
            0.0,
            seed,
            offset,
            0,
            False,
            shared_storage_dqdkdv=together,
        )
        return query, key, value


FLASH, EFFICIENT, FLASH_ON_CPU = _Flash(), _Efficient(), _FlashOnCpu()


class FusedAttention(torch.autograd.Function):
    """Attention by a kernel, with one gradient for its packed input.

    The input is packed [N, tokens, 3, heads, d], each token's query, key and value. Or it is packed
    [N, tokens, 2, heads, d], key and value, with separate queries [N, queries, heads, d].
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, packed: Tensor, queries: Tensor | None) -> Tensor:
        """Return [N * queries, heads * d]."""
        parts = packed.unbind(2) if queries is None else (queries, *packed.unbind(2))
        mixed, kept = kernel.forward(*parts)
        # Tensors go where autograd can free them, numbers stay in place.
        ctx.kernel = kernel
        ctx.numbers = [None if isinstance(one, Tensor) else one for one in kept]
        tensors = [one if isinstance(one, Tensor) else None for one in kept]
        ctx.save_for_backward(packed, queries, mixed, *tensors)
        return mixed.reshape(-1, mixed.shape[2] * mixed.shape[3])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None]:
        """Return the gradients of packed, in its layout, and of the queries."""
        packed, queries, mixed, *tensors = ctx.saved_tensors
        kept = tuple(
            number if tensor is None else tensor
            for tensor, number in zip(tensors, ctx.numbers, strict=True)
        )
        parts = packed.unbind(2) if queries is None else (queries, *packed.unbind(2))
        found = ctx.kernel.backward(gradient.reshape(mixed.shape), parts, mixed, kept)
        if queries is None:
            return None, side_by_side(found), None
        return None, side_by_side(found[1:]), found[0]


def side_by_side(parts: tuple[Tensor, ...]) -> Tensor:
    """Return tensors [N, tokens, heads, d] as one [N, tokens, P, heads, d], contiguous.

    Nothing is copied if they already lie in memory like that, because a kernel wrote them so.
    Otherwise each is copied once.
    """
    first, count = parts[0], len(parts)
    batch, tokens, heads, size = first.shape
    strides = (tokens * count * heads * size, count * heads * size, size, 1)
    start, storage = first.storage_offset(), first.untyped_storage()._cdata
    in_place = all(
        part.stride() == strides
        and part.untyped_storage()._cdata == storage
        and part.storage_offset() == start + k * heads * size
        for k, part in enumerate(parts)
    )
    if not in_place:
        return torch.stack(parts, dim=2)
    shape = (batch, tokens, count, heads, size)
    return first.as_strided(shape, (*strides[:2], heads * size, *strides[2:]), start)


@dataclass(frozen=True)
class Attention:
    """Attention for one device, dtype and size of a head.

    Attributes:
        kernel: The kernel; None for torch's own function, which then chooses one.
        description: The name of either, for reports.
    """

    kernel: Kernel | None
    description: str

    def __call__(self, packed: Tensor, queries: Tensor | None = None) -> Tensor:
        """Return [N * queries, heads * d], see `FusedAttention`."""
        if self.kernel is not None:
            mixed: Tensor = FusedAttention.apply(self.kernel, packed, queries)
            return mixed
        parts = packed.permute(2, 0, 3, 1, 4)  # [P, N, heads, tokens, d]
        query = parts[0] if queries is None else queries.transpose(1, 2)
        on_gpu = packed.device.type == "cuda"
        with sdpa_kernel(_ALLOWED) if on_gpu else nullcontext():
            attended = scaled_dot_product_attention(query, parts[-2], parts[-1])
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)


_chosen: dict[tuple[torch.device, torch.dtype, int], Attention] = {}
_forced: list[Kernel | None] = []


def choose_attention(device: torch.device, dtype: torch.dtype, head_size: int) -> Attention:
    """Return the attention for a device, a dtype and a size of a head.

    A kernel is tried before its first use. The trial waits for the device; later calls do not.
    """
    if _forced:
        return _tried(_forced[-1], device, dtype, head_size)
    key = (device, dtype, head_size)
    if key not in _chosen:
        _chosen[key] = _tried(_fitting(*key), *key)
    return _chosen[key]


@contextmanager
def only_kernel(kernel: Kernel | None) -> Iterator[None]:
    """Make towers that are frozen in this block use this kernel, or none, to compare kernels."""
    _forced.append(kernel)
    try:
        yield
    finally:
        _forced.pop()


def _fitting(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel | None:
    if device.type == "cpu":
        return FLASH_ON_CPU
    if device.type != "cuda":
        return None
    if dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 128:
        return FLASH
    return EFFICIENT if dtype == torch.float32 and head_size % 4 == 0 else None


def _tried(
    kernel: Kernel | None, device: torch.device, dtype: torch.dtype, head_size: int
) -> Attention:
    """Return the kernel's attention where it is right, else torch's."""
    if kernel is None:
        return Attention(None, "attention by torch's choice")
    try:
        error = deviation(kernel, device, dtype, head_size)
        if error <= _TOLERANCE[dtype]:  # what is not a number is not
            return Attention(kernel, kernel.name)
        reason = f"is off by {error:.1g} in the trial"
    except (RuntimeError, AttributeError, TypeError, ValueError) as failed:
        if is_out_of_memory(failed):
            raise
        said = one_line(str(failed).partition("\n")[0])
        reason = f"failed in the trial: {textwrap.shorten(said, 100, placeholder=' ...')}"
    return Attention(None, f"attention by torch's choice: {kernel.name} {reason}")


def deviation(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_size: int) -> float:
    """Return how far a kernel is off plain products in float64, as a share of their norm.

    The largest of result and gradients, for queries of all tokens and for those of one.
    """
    errors = []
    # Whoever predicts first may be in a mode without gradients.
    with torch.inference_mode(False), torch.enable_grad():
        for queries in (None, 1):
            given = [t.to(dtype) for t in _trial(head_size, queries)]
            found = _run(kernel, [t.to(device) for t in given], queries)
            truth = _run(None, [t.double() for t in given], queries)
            for one, right in zip(found, truth, strict=True):
                errors.append((one.double().cpu() - right).norm() / right.norm())
    return float(torch.stack(errors).max())  # NaN where one is


def _trial(head_size: int, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed, queries and the upstream gradient, for 2 images, 37 tokens and 3 heads."""
    tokens, heads = 37, 3

    def waves(step: float, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        steps = torch.arange(count, dtype=torch.float64, device="cpu")
        return torch.sin(step * steps).view(shape)

    packed = waves(0.7, 2, tokens, 3 if queries is None else 2, heads, head_size)
    few = waves(1.1, 2, queries or 1, heads, head_size)
    return packed, few, waves(1.9, 2 * (queries or tokens), heads * head_size)


def _run(kernel: Kernel | None, inputs: list[Tensor], queries: int | None) -> list[Tensor]:
    """Return the result and the gradients; kernel: None for plain products."""
    packed, few, pull = inputs
    packed, few = packed.detach().requires_grad_(), few.detach().requires_grad_()
    given = None if queries is None else few
    if kernel is not None:
        mixed: Tensor = FusedAttention.apply(kernel, packed, given)
    else:
        parts = packed.permute(2, 0, 3, 1, 4)
        query = parts[0] if given is None else given.transpose(1, 2)
        scores = query @ parts[-2].transpose(-1, -2) * packed.shape[-1] ** -0.5
        mixed = (scores.softmax(-1) @ parts[-1]).transpose(1, 2).reshape(pull.shape)
    leaves = (packed,) if given is None else (packed, few)
    return [mixed.detach(), *torch.autograd.grad(mixed, leaves, pull)]
