"""`embedding_collapse` and `zero_shot_loss`: what triggers do to embeddings, with gradients.

Native kernels and the checks of arguments are in csrc/objectives; what they compute is written out
in its core.h and, in plain PyTorch, in `pydetox.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import _library

_NARROW_DTYPES = (torch.float16, torch.bfloat16)  # the kernels take float32 instead


def embedding_collapse(z: Tensor) -> Tensor:
    """Return the mean cosine over the pairs i != j of each trigger's embeddings.

    With unit rows u_i that is (|sum u_i|^2 - B) / (B (B - 1)): O(BD), never a B x B matrix.
    DECREE's self-supervised objective (Feng et al., CVPR 2023) without its sign. A row of zeros has
    no direction: its cosine with every row is 0, and it gets no gradient. Norms and sums are in
    float64, in an order that does not depend on the number of threads.

    Differentiable, once.

    Args:
        z: [K, B, D], B at least 2, float16, bfloat16, float32 or float64.

    Returns:
        [K], in [-1 / (B - 1), 1] up to rounding; float64 where z is, else float32. NaN where a row
        is not finite, or its squares are too large for float64.

    Raises:
        UsageError: another shape or dtype.
    """
    cosine: Tensor = _library.call("embedding_collapse", _widened(z))
    return cosine


def zero_shot_loss(
    z: Tensor, head: Tensor, targets: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Return (loss [K], success [K]) of embeddings that must get their trigger's target class.

    loss: mean over a trigger's images of the cross-entropy of `logit_scale * unit(z) @ head.T` with
    its target (Neural Cleanse, Wang et al., S&P 2019). success: the share of images whose largest
    logit (the first one of equals) is the target's. A row of zeros has equal logits.

    The logits of all images are never stored: when z requires a gradient, that of the loss is
    computed in the same pass, from a few rows' logits at a time, and kept instead ([K, B, D]).
    Differentiable, once, in z; head gets no gradient, success has none. Sums run in an order that
    does not depend on the number of threads: the same call gives the same bits.

    Args:
        z: [K, B, D], B at least 1, float16, bfloat16, float32 or float64.
        head: unit rows [C, D], any of these dtypes.
        targets: int64 [K], classes 0..C-1. (On CUDA, where looking would wait for the device, the
            loss of a trigger with another target is NaN.)
        logit_scale: factor of the cosines, positive.

    Returns:
        Both float64 where z is, else float32. The loss is NaN where an embedding is not finite; it
        counts as no success.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit together, or a head that requires a
            gradient.
    """
    if head.requires_grad and torch.is_grad_enabled():
        raise UsageError("zero_shot_loss: head gets no gradient, only z does: pass head.detach()")
    wide = _widened(z)
    loss, success, _ = _library.call(
        "zero_shot_loss",
        wide,
        head.to(wide.dtype) if head.is_floating_point() else head,
        targets,
        float(logit_scale),
        z.requires_grad and torch.is_grad_enabled(),
    )
    return loss, success


def _widened(z: Tensor) -> Tensor:
    return z.to(torch.float32) if z.dtype in _NARROW_DTYPES else z


def _collapse_fake(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[:1])


def _collapse_backward_fake(gradient: Tensor, z: Tensor) -> Tensor:
    return z.new_empty(z.shape)


def _zero_shot_fake(
    z: Tensor, head: Tensor, targets: Tensor, logit_scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = z.new_empty(z.shape if with_gradient else (0,))
    return z.new_empty(z.shape[:1]), z.new_empty(z.shape[:1]), gradient


def _zero_shot_backward_fake(gradient: Tensor, z: Tensor, embeddings_gradient: Tensor) -> Tensor:
    return z.new_empty(z.shape)


def _save_embeddings(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _collapse_backward(ctx: Any, gradient: Tensor) -> Tensor:
    (z,) = ctx.saved_tensors
    result: Tensor = _library.call("embedding_collapse_backward", gradient, z)
    return result


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, success, embeddings_gradient = output
    ctx.mark_non_differentiable(success, embeddings_gradient)
    ctx.with_gradient = inputs[4]
    ctx.save_for_backward(inputs[0], embeddings_gradient)


def _zero_shot_backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.with_gradient:
        raise UsageError("zero_shot_loss was called without a gradient, which is asked for now")
    result: Tensor = _library.call("zero_shot_loss_backward", gradient, *ctx.saved_tensors)
    return result, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _refuse(operator: str) -> Any:
    def refuse_double_backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        raise UsageError(
            f"{operator} cannot be differentiated twice: {operator}_backward has no gradient; "
            f"pydetox.ops.reference.{operator} has one"
        )

    return refuse_double_backward


torch.library.register_fake("pydetox::embedding_collapse", _collapse_fake)
torch.library.register_fake("pydetox::embedding_collapse_backward", _collapse_backward_fake)
torch.library.register_fake("pydetox::zero_shot_loss", _zero_shot_fake)
torch.library.register_fake("pydetox::zero_shot_loss_backward", _zero_shot_backward_fake)
torch.library.register_autograd(
    "pydetox::embedding_collapse", _collapse_backward, setup_context=_save_embeddings
)
torch.library.register_autograd(
    "pydetox::zero_shot_loss", _zero_shot_backward, setup_context=_save_gradient
)
for _operator in ("embedding_collapse", "zero_shot_loss"):
    torch.library.register_autograd(
        f"pydetox::{_operator}_backward", _refuse(_operator), setup_context=_save_nothing
    )
