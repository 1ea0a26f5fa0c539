"""An optimiser that moves weights towards those of a base, and no farther.

What a suspect has learned since its base was published, the backdoor included, is the difference of
their weights. A vector that stays between the two, weight by weight, takes back some of this, and
adds nothing else. The share that is taken back of each weight is what is optimised, from 0 on. With
an alpha above 1, weights go farther in the same direction, and beyond the base where all was taken
back. Only parameters move: statistics of batch normalisation stay the suspect's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..models import OpenClipModel

# Gradients in shares are products with differences of weights, hence so small.
_BETAS, _EPSILON = (0.9, 0.98), 1e-12


#: The peak learning rate of repairs.
SHARE_PER_STEP = 0.1


def leads(model: OpenClipModel, base: OpenClipModel) -> bool:
    """Whether the image towers have the same parameters, and these are not all equal."""
    ours, theirs = (dict(one.visual.named_parameters()) for one in (model, base))
    shapes = [{name: value.shape for name, value in one.items()} for one in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return False
    return any(not torch.equal(own, theirs[name].to(own)) for name, own in ours.items())


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
