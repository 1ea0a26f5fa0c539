"""`stamp_triggers`: K triggers on B images in one pass, with gradients for the triggers.

Native kernels and the checks of arguments are in csrc/stamp_triggers; what they compute is written
out in its core.h and, in plain PyTorch, in `pydetox.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import _library

_FLOAT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def stamp_triggers(
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    patch_size: int | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    corners: Sequence[tuple[int, int]] | Tensor | None = None,
    only_box: bool = False,
) -> Tensor:
    """Blend every trigger into every image and normalise for the model.

    With m = tanh(mask_logits)/2 + 1/2 and p = tanh(pattern_logits)/2 + 1/2 the result is
    (clip((1 - m) x + m p, 0, 1) - mean) / std. Trigger inversion has used this form since Neural
    Cleanse (Wang et al., S&P 2019). One call computes it for all triggers and images.

    The result is differentiable once, in both logits. Images get no gradient. Gradients are summed
    over the images in an order that does not depend on the number of threads: the same call gives
    the same bits. The arithmetic is in float64 if the logits or the result are float64, and in
    float32 otherwise.

    If a trigger is zero outside a box of h x w pixels, pass the logits of the box and its corner.
    Outside the box, the result is that of a mask of exactly 0. The backward pass reads the
    upstream gradient only inside the boxes, so its cost is proportional to their size.

    Args:
        images: [B, C, H, W] for all triggers, or [K, B, C, H, W], a batch for each; uint8 (0..255,
            scaled by 1/255) or bfloat16, float32, float64 in [0, 1]; at most 16 channels.
        mask_logits: [K, H, W], bfloat16, float32 or float64; with `corners` [K, h, w].
        pattern_logits: [K, C, H, W], dtype of `mask_logits`; with `corners` [K, C, h, w].
        mean: C numbers, the model's channel means for pixels in [0, 1]; default 0.
        std: C numbers, the model's channel standard deviations; default 1.
        patch_size: None for images; P, a divisor of H and W, for the rows that a vision
            transformer's first matrix product takes: `rows @ conv1.weight.flatten(1).T`.
        dtype: the dtype of the result: bfloat16, float32 or float64; default: that of the logits.
        out: a tensor to write the result to: contiguous, of the result's shape, dtype and device,
            in memory that no argument shares. It is returned without an autograd graph; use
            `stamp_triggers_gradients` for the gradients. A loop that reuses its buffers allocates
            nothing. This also saves the time to clear fresh memory, which is longer than that of
            stamping.
        corners: the (top, left) pixel of each trigger's box, 0 <= top <= H - h and
            0 <= left <= W - w: K pairs of numbers, or an int64 tensor [K, 2] on the device of the
            images. Numbers and tensors on the CPU are checked. A tensor on a GPU is used without
            waiting for it, so that a CUDA graph can be replayed with other corners; a box that
            would stick out is moved to the border. Numbers are copied to the GPU first.
        only_box: whether to write only the boxes; needs `out` and `corners`. Outside the boxes,
            `out` must already hold what a call without `only_box` writes there, for example that
            of the step before with the same images and corners.

    Returns:
        [K, B, C, H, W], or [K, B, (H/P)(W/P), C*P*P] with columns in the order (c, py, px).

    Raises:
        UsageError: Shapes, dtypes or devices do not fit together, the images require a gradient,
            or corners (numbers, or a tensor on the CPU) let a box stick out of the image.
    """
    if only_box and out is None:
        raise UsageError("stamp_triggers: only_box needs out and corners")
    if out is not None:
        return _stamp_into(
            out,
            images,
            mask_logits,
            pattern_logits,
            mean,
            std,
            patch_size,
            dtype,
            corners,
            only_box,
        )
    if images.requires_grad and torch.is_grad_enabled():
        raise UsageError(
            "stamp_triggers: images get no gradient, only mask_logits and pattern_logits do: "
            "pass images.detach()"
        )
    if dtype is not None and dtype not in _FLOAT_DTYPES:
        raise UsageError(
            f"stamp_triggers: dtype must be bfloat16, float32 or float64, found {dtype}"
        )
    result_dtype = dtype or mask_logits.dtype
    # The kernels compute in the dtype of the logits that they get, float32 or float64, and write
    # float64 for the latter (csrc/stamp_triggers/core.h). Other dtypes are cast: the logits are
    # small, and other results are rare.
    compute = torch.float64 if torch.float64 in (mask_logits.dtype, result_dtype) else torch.float32
    stamped: Tensor = _library.call(
        "stamp_triggers",
        images,
        *_computed_in(compute, mask_logits, pattern_logits),
        _per_channel(mean, 0.0, images),
        _per_channel(std, 1.0, images),
        patch_size,
        torch.float64 if compute == torch.float64 else result_dtype,
        _corner_tensor(corners),
    )
    return stamped.to(result_dtype)


class TriggerGradients(NamedTuple):
    """The gradients of the loss by the logits, each of the shape and dtype of its logits."""

    mask_logits: Tensor
    pattern_logits: Tensor


def stamp_triggers_gradients(
    gradient: Tensor,
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    patch_size: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    corners: Sequence[tuple[int, int]] | Tensor | None = None,
) -> TriggerGradients:
    """Return the gradients of the logits without autograd, for loops that keep their buffers.

    Args:
        gradient: the gradient of the loss by the result of `stamp_triggers`, of the shape of that
            result; float64 if the logits are float64, else float32 or bfloat16.
        images: as in `stamp_triggers`.
        mask_logits: float32 or float64 [K, H, W]; with `corners` [K, h, w].
        pattern_logits: dtype of `mask_logits`, [K, C, H, W]; with `corners` [K, C, h, w].
        mean: as in `stamp_triggers`.
        std: as in `stamp_triggers`.
        patch_size: as in `stamp_triggers`.
        out: two tensors to write the gradients to: contiguous, like the two logits, in memory
            that nothing else shares.
        corners: as in `stamp_triggers`; `gradient` is read only inside the boxes.

    Raises:
        UsageError: Shapes, dtypes or devices do not fit together.
    """
    if out is None:
        out = torch.empty_like(mask_logits), torch.empty_like(pattern_logits)
        out = out[0].detach().contiguous(), out[1].detach().contiguous()
    _library.call(
        "stamp_triggers_backward_out",
        gradient.detach(),
        images,
        mask_logits.detach(),
        pattern_logits.detach(),
        _per_channel(mean, 0.0, images),
        _per_channel(std, 1.0, images),
        patch_size,
        _without_graph(out[0], "mask_logits_gradient"),
        _without_graph(out[1], "pattern_logits_gradient"),
        _corner_tensor(corners),
    )
    return TriggerGradients(*out)


def _stamp_into(
    out: Tensor,
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_size: int | None,
    dtype: torch.dtype | None,
    corners: Sequence[tuple[int, int]] | Tensor | None,
    only_box: bool,
) -> Tensor:
    if dtype not in (None, out.dtype):
        raise UsageError(f"stamp_triggers: out must be {dtype} as dtype says, found {out.dtype}")
    _library.call(
        "stamp_triggers_out",
        images,
        mask_logits.detach(),
        pattern_logits.detach(),
        _per_channel(mean, 0.0, images),
        _per_channel(std, 1.0, images),
        patch_size,
        _without_graph(out, "out"),
        _corner_tensor(corners),
        only_box,
    )
    return out


def _result_shape(images: Tensor, mask_logits: Tensor, patch_size: int | None) -> list[int]:
    triggers = mask_logits.shape[0]
    batch, channels, height, width = images.shape[-4:]
    if not patch_size:
        return [triggers, batch, channels, height, width]
    patches = (height // patch_size) * (width // patch_size)
    return [triggers, batch, patches, channels * patch_size * patch_size]


def _computed_in(compute: torch.dtype, mask: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Cast the logits, except those of a wrong dtype: the operator refuses these."""
    fits = mask.dtype in _FLOAT_DTYPES and mask.dtype == pattern.dtype
    return (mask.to(compute), pattern.to(compute)) if fits else (mask, pattern)


def _corner_tensor(corners: Sequence[tuple[int, int]] | Tensor | None) -> Tensor | None:
    """Return numbers as a tensor on the CPU; the operator checks it and copies it to a GPU."""
    if corners is None or isinstance(corners, Tensor):
        return corners
    if any(not isinstance(corner, (tuple, list)) or len(corner) != 2 for corner in corners):
        raise UsageError(
            f"stamp_triggers: corners must be (top, left) for each trigger, found {corners}"
        )
    return torch.tensor([list(corner) for corner in corners], dtype=torch.int64).view(-1, 2)


def _per_channel(values: Sequence[float] | None, default: float, images: Tensor) -> list[float]:
    if values is None:
        return [default] * (images.shape[-3] if images.dim() >= 3 else 0)
    return [float(value) for value in values]


def _without_graph(out: Tensor, name: str) -> Tensor:
    if out.requires_grad:
        raise UsageError(f"stamp_triggers: {name} must not require a gradient")
    return out


def _stamp_triggers_fake(
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int | None,
    dtype: torch.dtype,
    corners: Tensor | None = None,
) -> Tensor:
    return images.new_empty(_result_shape(images, mask_logits, patch_size), dtype=dtype)


def _stamp_triggers_backward_fake(
    gradient: Tensor,
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int | None,
    corners: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        mask_logits.new_empty(mask_logits.shape),
        pattern_logits.new_empty(pattern_logits.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, mask_logits, pattern_logits, ctx.mean, ctx.std, ctx.patch_size, _, corners = inputs
    ctx.save_for_backward(images, mask_logits, pattern_logits, corners)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, corners = ctx.saved_tensors
    mask_gradient, pattern_gradient = _library.call(
        "stamp_triggers_backward", gradient, *tensors, ctx.mean, ctx.std, ctx.patch_size, corners
    )
    return None, mask_gradient, pattern_gradient, None, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pass


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
    raise UsageError(
        "stamp_triggers cannot be differentiated twice: stamp_triggers_backward has no gradient; "
        "pydetox.ops.reference.stamp_triggers has one"
    )


torch.library.register_fake("pydetox::stamp_triggers", _stamp_triggers_fake)
torch.library.register_fake("pydetox::stamp_triggers_backward", _stamp_triggers_backward_fake)
torch.library.register_fake("pydetox::stamp_triggers_out", lambda *_, **__: None)
torch.library.register_fake("pydetox::stamp_triggers_backward_out", lambda *_, **__: None)
torch.library.register_autograd(
    "pydetox::stamp_triggers", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "pydetox::stamp_triggers_backward", _refuse_double_backward, setup_context=_save_nothing
)
