"""`stamp_triggers`: K triggers on B images in one pass, with gradients for the triggers.

Native kernels are in csrc/cpu and csrc/cuda; what they compute is written out in csrc/core/stamp.h
and, in plain PyTorch, in `pydetox.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import _library  # noqa: F401  loads the operators registered below

MAX_CHANNELS = 16  # kMaxChannels of csrc/core/stamp.h

_IMAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)
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
    (clip((1 - m) x + m p, 0, 1) - mean) / std: the way in which trigger inversion has written a
    trigger since Neural Cleanse (Wang et al., S&P 2019), for all triggers and images at once.

    Differentiable, once, in both logits; images get no gradient. Gradients are summed over the
    images in an order that does not depend on the number of threads: the same call gives the same
    bits. Arithmetic is in float64 where the logits or the result are, in float32 otherwise.

    A trigger that is zero outside of a box of h x w pixels has logits for the box alone and a
    corner. Outside of it the result is that of a mask of exactly 0. The backward pass reads the
    upstream gradient inside of the boxes only, and what it costs is proportional to them.

    Args:
        images: [B, C, H, W] for all triggers, or [K, B, C, H, W], a batch for each; uint8 (0..255,
            scaled by 1/255) or bfloat16, float32, float64 in [0, 1]; at most 16 channels.
        mask_logits: [K, H, W], bfloat16, float32 or float64; with `corners` [K, h, w].
        pattern_logits: [K, C, H, W], dtype of `mask_logits`; with `corners` [K, C, h, w].
        mean: C numbers, the model's channel means for pixels in [0, 1]; default 0.
        std: C numbers, the model's channel standard deviations; default 1.
        patch_size: None for images; P, a divisor of H and W, for the rows that a vision
            transformer's first matrix product takes: `rows @ conv1.weight.flatten(1).T`.
        dtype: of the result: bfloat16, float32 or float64; default that of the logits.
        out: where to write the result: contiguous, of its shape, dtype and device, in memory that
            no argument shares. It is returned, without an autograd graph: for the gradients there
            is `stamp_triggers_gradients`. A loop that keeps its buffers allocates nothing, and
            spares the system clearing fresh memory, which takes longer than stamping.
        corners: of each trigger's box the (top, left) pixel, 0 <= top <= H - h and
            0 <= left <= W - w: K pairs of numbers, or an int64 tensor [K, 2] on the device of the
            images. Numbers and tensors on the CPU are checked. A tensor on a GPU is used as it is,
            without waiting for it, so that a CUDA graph can be replayed with other corners; a box
            that would stick out is moved to the border. Numbers are copied to a GPU first.
        only_box: with `out` and `corners`: write the boxes alone. `out` must hold the images as a
            call without it leaves them outside of the boxes, e.g. of the step before, with the same
            images and corners.

    Returns:
        [K, B, C, H, W], or [K, B, (H/P)(W/P), C*P*P] with columns in the order (c, py, px).

    Raises:
        UsageError: shapes, dtypes or devices that do not fit together, images that require a
            gradient, numbers in `corners` that let a box stick out.
        RuntimeError: values of a tensor `corners` on the CPU that do.
    """
    if only_box and (out is None or corners is None):
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
    _check(images, mask_logits, pattern_logits, patch_size, dtype, corners)
    channels = images.shape[-3]
    mean_list = _per_channel(mean, 0.0, channels, "mean")
    std_list = _checked_std(std, channels)
    result_dtype = dtype or mask_logits.dtype
    # The kernels compute in the dtype of the logits they get, float32 or float64, and write float64
    # for the latter (csrc/core/stamp.h); any other wish is a cast of something small, or rare.
    compute = torch.float64 if torch.float64 in (mask_logits.dtype, result_dtype) else torch.float32
    stamped: Tensor = torch.ops.pydetox.stamp_triggers.default(
        images,
        mask_logits.to(compute),
        pattern_logits.to(compute),
        mean_list,
        std_list,
        patch_size or 0,
        torch.float64 if compute == torch.float64 else result_dtype,
        _corner_tensor(corners, images.device),
    )
    return stamped.to(result_dtype)


class TriggerGradients(NamedTuple):
    """Of the logits, shaped like them."""

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
        gradient: of the loss by the result of `stamp_triggers`, shaped like it; float64 where the
            logits are, else float32 or bfloat16.
        images: as in `stamp_triggers`.
        mask_logits: float32 or float64 [K, H, W]; with `corners` [K, h, w].
        pattern_logits: dtype of `mask_logits`, [K, C, H, W]; with `corners` [K, C, h, w].
        mean: as in `stamp_triggers`.
        std: as in `stamp_triggers`.
        patch_size: as in `stamp_triggers`.
        out: where to write them: contiguous tensors like the two logits, in memory of their own.
        corners: as in `stamp_triggers`; `gradient` is read inside of the boxes only.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit together.
    """
    _check(images, mask_logits, pattern_logits, patch_size, None, corners, differentiable=False)
    _check_exact(mask_logits, gradient.dtype, "gradient")
    expected = _result_shape(images, mask_logits, patch_size)
    if list(gradient.shape) != expected or gradient.device != images.device:
        raise UsageError(
            f"stamp_triggers_gradients: gradient must be {expected} on {images.device} for images "
            f"{list(images.shape)} and mask_logits {list(mask_logits.shape)}, found "
            f"{list(gradient.shape)} on {gradient.device}"
        )
    if out is None:
        out = torch.empty_like(mask_logits), torch.empty_like(pattern_logits)
        out = out[0].contiguous(), out[1].contiguous()
    for name, buffer, like in zip(
        ("mask_logits", "pattern_logits"), out, (mask_logits, pattern_logits), strict=True
    ):
        _check_out(buffer, list(like.shape), like.dtype, images.device, f"out for {name}")
    channels = images.shape[-3]
    torch.ops.pydetox.stamp_triggers_backward_out.default(
        gradient.detach(),
        images,
        mask_logits.detach(),
        pattern_logits.detach(),
        _per_channel(mean, 0.0, channels, "mean"),
        _checked_std(std, channels),
        patch_size or 0,
        *out,
        _corner_tensor(corners, images.device),
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
    _check(images, mask_logits, pattern_logits, patch_size, dtype, corners, differentiable=False)
    _check_exact(mask_logits, dtype or out.dtype, "out")
    _check_out(
        out,
        _result_shape(images, mask_logits, patch_size),
        dtype or out.dtype,
        images.device,
        "out",
    )
    channels = images.shape[-3]
    torch.ops.pydetox.stamp_triggers_out.default(
        images,
        mask_logits.detach(),
        pattern_logits.detach(),
        _per_channel(mean, 0.0, channels, "mean"),
        _checked_std(std, channels),
        patch_size or 0,
        out,
        _corner_tensor(corners, images.device),
        only_box,
    )
    return out


def _check_exact(logits: Tensor, dtype: torch.dtype, name: str) -> None:
    """Without autograd there are no casts around the kernel: dtypes are the kernel's own."""
    allowed = {
        torch.float32: (torch.float32, torch.bfloat16),
        torch.float64: (torch.float64,),
    }.get(logits.dtype)
    if allowed is None or dtype not in allowed:
        raise UsageError(
            f"stamp_triggers: {name} must be float32 or bfloat16 for float32 logits, float64 for "
            f"float64 logits; found {dtype} for {logits.dtype}"
        )


def _check_out(
    out: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device, name: str
) -> None:
    if list(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise UsageError(
            f"stamp_triggers: {name} must be {dtype} {shape} on {device}, found {out.dtype} "
            f"{list(out.shape)} on {out.device}"
        )
    if not out.is_contiguous():
        raise UsageError(f"stamp_triggers: {name} must be contiguous, found strides {out.stride()}")
    if out.requires_grad:
        raise UsageError(f"stamp_triggers: {name} must not require a gradient")


def _result_shape(images: Tensor, mask_logits: Tensor, patch_size: int | None) -> list[int]:
    triggers = mask_logits.shape[0]
    batch, channels, height, width = images.shape[-4:]
    if not patch_size:
        return [triggers, batch, channels, height, width]
    patches = (height // patch_size) * (width // patch_size)
    return [triggers, batch, patches, channels * patch_size * patch_size]


def _check(
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    patch_size: int | None,
    dtype: torch.dtype | None,
    corners: Sequence[tuple[int, int]] | Tensor | None,
    *,
    differentiable: bool = True,
) -> None:
    if images.dim() not in (4, 5):
        raise UsageError(
            f"stamp_triggers: images must be [B, C, H, W] or [K, B, C, H, W], "
            f"found {list(images.shape)}"
        )
    channels, height, width = images.shape[-3:]
    if corners is None and (mask_logits.dim() != 3 or mask_logits.shape[1:] != (height, width)):
        raise UsageError(
            f"stamp_triggers: mask_logits must be [K, {height}, {width}] for images "
            f"{list(images.shape)}, found {list(mask_logits.shape)}"
        )
    if corners is not None and (
        mask_logits.dim() != 3 or mask_logits.shape[1] > height or mask_logits.shape[2] > width
    ):
        raise UsageError(
            f"stamp_triggers: with corners, mask_logits must be [K, h, w] with h <= {height} and "
            f"w <= {width} for images {list(images.shape)}, found {list(mask_logits.shape)}"
        )
    triggers, *box = mask_logits.shape
    if images.dim() == 5 and images.shape[0] != triggers:
        raise UsageError(
            f"stamp_triggers: images [K, B, C, H, W] must have a batch for each of {triggers} "
            f"triggers, found {list(images.shape)}"
        )
    if list(pattern_logits.shape) != [triggers, channels, *box]:
        raise UsageError(
            f"stamp_triggers: pattern_logits must be {[triggers, channels, *box]} "
            f"for images {list(images.shape)} and mask_logits {list(mask_logits.shape)}, "
            f"found {list(pattern_logits.shape)}"
        )
    if corners is not None:
        _check_corners(corners, mask_logits, images)
    if channels > MAX_CHANNELS:
        raise UsageError(
            f"stamp_triggers: at most {MAX_CHANNELS} channels, found images {list(images.shape)}"
        )
    if images.dtype not in _IMAGE_DTYPES:
        raise UsageError(
            f"stamp_triggers: images must be uint8, bfloat16, float32 or float64, "
            f"found {images.dtype}"
        )
    if mask_logits.dtype not in _FLOAT_DTYPES or mask_logits.dtype != pattern_logits.dtype:
        raise UsageError(
            f"stamp_triggers: mask_logits and pattern_logits must both be bfloat16, float32 or "
            f"float64, found {mask_logits.dtype} and {pattern_logits.dtype}"
        )
    if dtype is not None and dtype not in _FLOAT_DTYPES:
        raise UsageError(
            f"stamp_triggers: dtype must be bfloat16, float32 or float64, found {dtype}"
        )
    if not images.device == mask_logits.device == pattern_logits.device:
        raise UsageError(
            f"stamp_triggers: images, mask_logits and pattern_logits must be on one device, "
            f"found {images.device}, {mask_logits.device} and {pattern_logits.device}"
        )
    if patch_size is not None and (
        patch_size < 1 or height % patch_size != 0 or width % patch_size != 0
    ):
        raise UsageError(
            f"stamp_triggers: patch_size must divide height and width of images "
            f"{list(images.shape)}, found {patch_size}"
        )
    if differentiable and images.requires_grad and torch.is_grad_enabled():
        raise UsageError(
            "stamp_triggers: images get no gradient, only mask_logits and pattern_logits do: "
            "pass images.detach()"
        )


def _check_corners(
    corners: Sequence[tuple[int, int]] | Tensor, mask_logits: Tensor, images: Tensor
) -> None:
    triggers, *box = mask_logits.shape
    if isinstance(corners, Tensor):  # the operator looks at the values
        if list(corners.shape) != [triggers, 2] or corners.dtype != torch.int64:
            raise UsageError(
                f"stamp_triggers: corners must be int64 [{triggers}, 2] for mask_logits "
                f"{list(mask_logits.shape)}, found {corners.dtype} {list(corners.shape)}"
            )
        if corners.device != images.device:
            raise UsageError(
                f"stamp_triggers: corners must be numbers or on the device of the images, "
                f"{images.device}, found {corners.device}"
            )
        return
    if len(corners) != triggers or any(
        not isinstance(corner, (tuple, list)) or len(corner) != 2 for corner in corners
    ):
        raise UsageError(
            f"stamp_triggers: corners must be (top, left) for each of {triggers} triggers, "
            f"found {corners}"
        )
    last = [whole - part for whole, part in zip(images.shape[-2:], box, strict=True)]
    for k, corner in enumerate(corners):
        if not all(0 <= place <= end for place, end in zip(corner, last, strict=True)):
            raise UsageError(
                f"stamp_triggers: corners[{k}] is {tuple(corner)}; a box of {box[0]}x{box[1]} in "
                f"images of {images.shape[-2]}x{images.shape[-1]} has its top in 0..{last[0]} and "
                f"its left in 0..{last[1]}"
            )


def _corner_tensor(
    corners: Sequence[tuple[int, int]] | Tensor | None, device: torch.device
) -> Tensor | None:
    if corners is None or isinstance(corners, Tensor):
        return corners
    rows = [list(corner) for corner in corners]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 2)


def _checked_std(std: Sequence[float] | None, channels: int) -> list[float]:
    values = _per_channel(std, 1.0, channels, "std")
    if any(value == 0 for value in values):
        raise UsageError(f"stamp_triggers: std must not be 0, found {values}")
    return values


def _per_channel(
    values: Sequence[float] | None, default: float, channels: int, name: str
) -> list[float]:
    if values is None:
        return [default] * channels
    if len(values) != channels:
        raise UsageError(
            f"stamp_triggers: {name} must have one number for each of {channels} channels, "
            f"found {len(values)}"
        )
    return [float(value) for value in values]


def _stamp_triggers_fake(
    images: Tensor,
    mask_logits: Tensor,
    pattern_logits: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
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
    patch_size: int,
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
    mask_gradient, pattern_gradient = torch.ops.pydetox.stamp_triggers_backward.default(
        gradient, *tensors, ctx.mean, ctx.std, ctx.patch_size, corners
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
