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
    """The smallest triggers so far. An update replaces them where `eligible` is true.

    Attributes:
        logits: the logits of mask [K, H, W] and pattern [K, C, H, W], contiguous, in memory that
            nothing else shares.
        norm: float64 [K], the |mask|_1 of each trigger; infinity as long as there is none.
        eligible: bool [K], whether the trigger may be kept.
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

    The operator reads the mask's logits of an active trigger for the norm, and then passes once
    over its logits, gradients and moments. It touches no memory of an inactive trigger, which
    therefore costs nothing. Results have the same bits for any number of threads and on CUDA.
    Nothing waits for the device.

    Args:
        logits: the logits of mask [K, H, W] and pattern [K, C, H, W], float32 or float64. Logits
            and moments are contiguous, and each has memory that nothing else shares.
        gradients: the gradients of the objective alone, of the shapes and dtype of the logits.
        first: the first moments, like the logits; zeros before the first step.
        second: the second moments, like the logits; zeros before the first step.
        cost: float32 or float64 [K], the weight of the mask's norm.
        learning_rate: float32 or float64 [K].
        steps: int64 [K], the number of steps taken so far. It is increased for active triggers.
        active: bool [K], whether the trigger takes this step.
        betas: the decay rates of the moments, in [0, 1).
        epsilon: the non-negative number that is added to the denominator.
        total_variation: float32 or float64 [K], the weight of TV; None to leave TV out.
        best: the best triggers so far. If a trigger is eligible and the norm of its mask is smaller
            than `best.norm`, the logits before the step and the norm are written here.

    Returns:
        float64 [K], |mask|_1 before the step; NaN for an inactive trigger.

    Raises:
        UsageError: Shapes, dtypes, devices or memory do not fit together.
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
