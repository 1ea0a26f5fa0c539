"""`embedding_collapse` and `zero_shot_loss`: losses on triggered embeddings, with gradients.

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

    With unit rows u_i, the result is (|sum u_i|^2 - B) / (B (B - 1)). This takes O(BD) operations
    and needs no B x B matrix. It is the negative of DECREE's self-supervised objective (Feng et
    al., CVPR 2023). A row of zeros has no direction: its cosine with every row is 0, and its
    gradient is 0. Norms and sums are computed in float64, in an order that does not depend on the
    number of threads.

    The result is differentiable once.

    Args:
        z: [K, B, D], B at least 2, float16, bfloat16, float32 or float64.

    Returns:
        [K], in [-1 / (B - 1), 1] up to rounding; float64 if z is float64, else float32. A trigger
        has NaN if one of its rows is not finite, or if its squares are too large for float64.

    Raises:
        UsageError: z has another shape or dtype.
    """
    cosine: Tensor = _library.call("embedding_collapse", _widened(z))
    return cosine


def zero_shot_loss(
    z: Tensor, head: Tensor, targets: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Return (loss [K], success [K]) of embeddings that must get their trigger's target class.

    The loss is the mean, over a trigger's images, of the cross-entropy between
    `logit_scale * unit(z) @ head.T` and the trigger's target (Neural Cleanse, Wang et al., S&P
    2019). The success is the share of images whose largest logit belongs to the target. If several
    logits are equally large, the first one counts. A row of zeros has equal logits.

    The logits of all images are never stored. If z requires a gradient, the same pass computes the
    gradient of the loss from a few rows' logits at a time and keeps it ([K, B, D]). The loss is
    differentiable once, in z. The head gets no gradient, and the success has none. Sums run in an
    order that does not depend on the number of threads: the same call gives the same bits.

    Args:
        z: [K, B, D], B at least 1, float16, bfloat16, float32 or float64.
        head: unit rows [C, D], any of these dtypes.
        targets: int64 [K], classes 0..C-1. On CUDA, checking them would wait for the device;
            there, the loss of a trigger with another target is NaN.
        logit_scale: the positive factor of the cosines.

    Returns:
        Two tensors [K], float64 if z is float64, else float32. The loss is NaN if an embedding is
        not finite, and such an embedding counts as a failure.

    Raises:
        UsageError: Shapes, dtypes or devices do not fit together, or the head requires a gradient.
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
