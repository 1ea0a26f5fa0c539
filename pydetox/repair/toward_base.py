"""An optimiser that moves weights towards those of a base, and no farther.

What a suspect has learned since its base was published, the backdoor included, is the difference of
their weights. A repair that stays between the two, weight by weight, can only take some of this
back: it makes nothing that neither model has. The share that is taken back of each weight is what
is optimised, from 0 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

# Gradients in shares are products with differences of weights, hence so small.
_BETAS, _EPSILON = (0.9, 0.98), 1e-12


#: The peak learning rate of repairs.
SHARE_PER_STEP = 0.1


class TowardBase(torch.optim.Optimizer):
    """Adam on the share of each weight's way to a base, in [0, 1].

    A weight w that began at s and has b in the base is s + u (b - s). The gradient in u is (b - s)
    times that in w, and u is clamped after each step. A learning rate of 0.1 thus moves a weight by
    at most about a tenth of its way per step. Weights that base and suspect share stay as they are.
    """

    def __init__(
        self, parameters: Sequence[Tensor], base: Sequence[Tensor], learning_rate: float = 0.1
    ) -> None:
        """Begin where the parameters are.

        parameters: The weights. base: Their values in the base, in the same order and shapes.
        Raises UsageError for tensors of other shapes.
        """
        if [one.shape for one in parameters] != [one.shape for one in base]:
            raise UsageError("the base has other tensors; expected the shapes of the parameters")
        super().__init__(list(parameters), {"lr": learning_rate})
        for weight, there in zip(parameters, base, strict=True):
            start = weight.detach().clone()
            zeros = torch.zeros_like(start, dtype=torch.float32)
            self.state[weight] = {
                "start": start,
                "way": there.detach().to(start) - start,
                "share": zeros,
                "mean": zeros.clone(),
                "square": zeros.clone(),
            }
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in _BETAS)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                kept: dict[str, Any] = self.state[weight]
                gradient = (weight.grad * kept["way"]).float()
                kept["mean"].lerp_(gradient, 1 - _BETAS[0])
                kept["square"].lerp_(gradient.square(), 1 - _BETAS[1])
                deviation = (kept["square"] / second).sqrt_().add_(_EPSILON)
                kept["share"].addcdiv_(kept["mean"] / first, deviation, value=-group["lr"])
                kept["share"].clamp_(0, 1)
                weight.copy_(torch.addcmul(kept["start"], kept["share"].to(weight), kept["way"]))
