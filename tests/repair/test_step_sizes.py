"""Rates relative to the weights, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from pydetox.repair.step_sizes import VECTOR_RATE, relative_rates
from pydetox.training import optimize


def test_rates_follow_the_size_of_weights_and_the_width() -> None:
    calibrated, narrow, wide, kernel, empty, gain = relative_rates(
        [
            torch.full((128, 128), 0.055),
            torch.full((7, 64), -1 / 8),
            torch.full((9, 1024), 1 / 32),
            torch.full((5, 3, 2, 2), 0.5),
            torch.zeros(3, 64),
            torch.ones(64),
        ]
    )
    assert calibrated == pytest.approx(4e-4)
    # Of weights of the size 1/sqrt(n), rates are in proportion to 1/n.
    assert wide == pytest.approx(narrow / 16)
    assert empty == pytest.approx(narrow)
    assert kernel == pytest.approx(narrow * 4 / (math.sqrt(12) / math.sqrt(64)))
    assert gain == VECTOR_RATE


def test_each_parameter_moves_by_its_own_rate() -> None:
    def moved(rate: float | list[float]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
        target = [torch.zeros(n) for n in (2, 3, 4)]

        def loss(batch: torch.Tensor) -> torch.Tensor:
            del batch
            return sum(((p - t) ** 2).sum() for p, t in zip(parameters, target, strict=True))  # type: ignore[return-value]

        batches = iter([torch.zeros(1)] * 3)
        optimize(parameters, loss, batches, steps=3, learning_rate=rate, description="test")
        return [p.detach() for p in parameters]

    same, listed = moved(0.01), moved([0.01, 0.01, 0.01])
    assert all(torch.equal(a, b) for a, b in zip(same, listed, strict=True))
    mixed = moved([0.01, 0.001, 0.01])
    # Adam's first steps are as long as its rate, whatever the gradient is.
    shares = [float((1 - one).mean()) for one in mixed]
    assert shares[0] == pytest.approx(shares[2], rel=1e-4)
    assert shares[1] == pytest.approx(shares[0] / 10, rel=0.05)
