"""Adam (Kingma and Ba, 2015, algorithm 1) on tensors that hold K triggers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Adam:
    """Plain Adam, updating in place; first dimension K."""

    def __init__(
        self, parameters: Sequence[Tensor], betas: tuple[float, float], epsilon: float = 1e-8
    ) -> None:
        self._parameters = list(parameters)
        self._betas = betas
        self._epsilon = epsilon
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Take one step. gradients: shaped like the parameters."""
        beta1, beta2 = self._betas
        self._steps += 1
        rate = learning_rate / (1 - beta1**self._steps)
        correction = (1 - beta2**self._steps) ** 0.5
        for parameter, gradient, first, second in zip(
            self._parameters, gradients, self._first, self._second, strict=True
        ):
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = second.sqrt().div_(correction).add_(self._epsilon)
            parameter.addcdiv_(first, denominator, value=-rate)
