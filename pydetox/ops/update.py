"""`trigger_update`: one step of Adam for K triggers, in place, with the penalties of their masks.

Native kernels and the checks of arguments are in csrc/trigger_update; what they compute is written
out in its core.h and, in plain PyTorch, in `pydetox.ops.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydetox.ops import _library


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
    norms: Tensor = _library.call(
        "trigger_update",
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
    return norms


torch.library.register_fake(
    "pydetox::trigger_update",
    lambda mask_logits, *_: mask_logits.new_empty(mask_logits.shape[:1], dtype=torch.float64),
)
