"""`trigger_update`: one step of Adam for K triggers, in place, with the penalties of their masks.

Native kernels are in csrc/cpu and csrc/cuda; what they compute is written out in
csrc/core/trigger_update.h and, in plain PyTorch, in `pydetox.ops.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import _library  # noqa: F401  loads the operators registered below

_FLOAT_DTYPES = (torch.float32, torch.float64)


class BestTriggers(NamedTuple):
    """The smallest triggers so far, which an update keeps where `eligible` says that they count.

    logits: of mask [K, H, W] and pattern [K, C, H, W], contiguous, in memory of their own.
    norm: float64 [K], |mask|_1 of each; infinity before there is one. eligible: bool [K].
    """

    logits: tuple[Tensor, Tensor]
    norm: Tensor
    eligible: Tensor


def trigger_update(
    logits: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    *,
    cost: Tensor,
    learning_rate: Tensor,
    steps: Tensor,
    active: Tensor,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
    total_variation: Tensor | None = None,
    best: BestTriggers | None = None,
) -> Tensor:
    """Take one step of Adam for every active trigger, in place; return |mask|_1 before it.

    Minimises objective + cost * |m|_1 + total_variation * TV(m), where m = tanh(w)/2 + 1/2 and
    TV(m) = sum over all pixels of |m[y, x] - m[y+1, x]| + |m[y, x] - m[y, x+1]| (anisotropic;
    Rudin, Osher, Fatemi 1992; as a penalty of triggers: TABOR, Guo et al. 2019). Its subgradient
    at equal neighbours is 0. Adam is algorithm 1 of Kingma and Ba (2015).

    Logits, gradients and moments of an active trigger are passed over once, after its mask's logits
    have been read for the norm. Of a trigger that is not active no memory is touched, so that it
    costs nothing. Results have the same bits for any number of threads, and on CUDA; nothing waits
    for the device.

    Args:
        logits: of mask [K, H, W] and pattern [K, C, H, W], float32 or float64. Like the moments
            contiguous, and each in memory of its own.
        gradients: of the objective alone, shaped like the logits and of their dtype.
        first: first moments, likewise; zeros before the first step.
        second: second moments, likewise.
        cost: float32 or float64 [K], the weight of the mask's norm.
        learning_rate: float32 or float64 [K].
        steps: int64 [K], steps taken so far; counted up where active.
        active: bool [K].
        betas: decay rates of the moments, in [0, 1).
        epsilon: added to the denominator; not negative.
        total_variation: float32 or float64 [K], the weight of TV; None for none.
        best: where `best.eligible`, and the mask's norm is smaller than `best.norm`, the logits
            before the step and the norm are written there.

    Returns:
        float64 [K]; NaN for a trigger that is not active.

    Raises:
        UsageError: shapes, dtypes, devices or memory that do not fit together.
    """
    _check(logits, gradients, first, second, best)
    triggers = logits[0].shape[0]
    vectors = {"cost": cost, "learning_rate": learning_rate, "steps": steps, "active": active}
    if total_variation is not None:
        vectors["total_variation"] = total_variation
    if best is not None:
        vectors |= {"best.norm": best.norm, "best.eligible": best.eligible}
    _check_vectors(vectors, triggers, logits[0].device)
    if not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"trigger_update: betas must be in [0, 1), found {betas}")
    if not epsilon >= 0:
        raise UsageError(f"trigger_update: epsilon must not be negative, found {epsilon}")
    try:
        norms: Tensor = torch.ops.pydetox.trigger_update.default(
            *(t.detach() for pair in (logits, gradients, first, second) for t in pair),
            cost,
            learning_rate,
            total_variation,
            steps,
            active,
            *((None,) * 4 if best is None else (*best.logits, best.norm, best.eligible)),
            *betas,
            epsilon,
        )
    except RuntimeError as error:
        if "must not share memory" in str(error):  # only the operator sees where tensors lie
            raise UsageError(str(error).partition("\n")[0]) from None
        raise
    return norms


def _check(
    logits: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    best: BestTriggers | None,
) -> None:
    mask, pattern = logits
    if mask.dim() != 3:
        raise UsageError(f"trigger_update: mask logits must be [K, H, W], found {list(mask.shape)}")
    triggers, height, width = mask.shape
    if pattern.dim() != 4 or (pattern.shape[0], *pattern.shape[2:]) != (triggers, height, width):
        raise UsageError(
            f"trigger_update: pattern logits must be [{triggers}, C, {height}, {width}] for mask "
            f"logits {list(mask.shape)}, found {list(pattern.shape)}"
        )
    if mask.dtype not in _FLOAT_DTYPES:
        raise UsageError(f"trigger_update: logits must be float32 or float64, found {mask.dtype}")
    groups = {"logits": logits, "gradients": gradients, "first": first, "second": second}
    if best is not None:
        groups["best.logits"] = best.logits
    for name, pair in groups.items():
        for part, tensor, like in zip(("mask", "pattern"), pair, logits, strict=True):
            if tensor.shape != like.shape or tensor.dtype != mask.dtype:
                raise UsageError(
                    f"trigger_update: {name} of the {part} must be {mask.dtype} "
                    f"{list(like.shape)} as its logits are, found {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            if tensor.device != mask.device:
                raise UsageError(
                    f"trigger_update: {name} of the {part} must be on {mask.device} as the logits "
                    f"are, found {tensor.device}"
                )
            if name != "gradients" and not tensor.is_contiguous():
                raise UsageError(
                    f"trigger_update: {name} of the {part} must be contiguous, found strides "
                    f"{tensor.stride()}"
                )


def _check_vectors(vectors: dict[str, Tensor], triggers: int, device: torch.device) -> None:
    expected = {
        "steps": (torch.int64,),
        "active": (torch.bool,),
        "best.norm": (torch.float64,),
        "best.eligible": (torch.bool,),
    }
    for name, tensor in vectors.items():
        dtypes = expected.get(name, _FLOAT_DTYPES)
        if tensor.shape != (triggers,) or tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise UsageError(
                f"trigger_update: {name} must be {wanted} [{triggers}], one for each trigger, "
                f"found {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise UsageError(
                f"trigger_update: {name} must be on {device} as the logits are, found "
                f"{tensor.device}"
            )
        if not tensor.is_contiguous():
            raise UsageError(
                f"trigger_update: {name} must be contiguous, found strides {tensor.stride()}"
            )


torch.library.register_fake(
    "pydetox::trigger_update",
    lambda mask_logits, *_: mask_logits.new_empty(mask_logits.shape[:1], dtype=torch.float64),
)
