"""How far models lie from their base, against float64 sums in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from pydetox.detect.distance import (
    FIRST_RUNG,
    LAST_RUNG,
    model_distance,
    relative_distance,
    rung_of,
    too_far,
)
from tests.mini import mini_model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_the_norm_of_the_matrices_differences(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    base, weights = (
        {
            "visual.a": torch.randn(7, 5, generator=generator).to(dtype),
            "visual.b": torch.randn(3, 2, 4, generator=generator).to(dtype),
            "visual.bias": torch.randn(9, generator=generator).to(dtype),
            "visual.steps": torch.ones(2, 2, dtype=torch.int64),
            "text": torch.randn(4, 4, generator=generator).to(dtype),
        }
        for _ in range(2)
    )
    first, second = (
        torch.cat([one["visual.a"].double().flatten(), one["visual.b"].double().flatten()])
        for one in (base, weights)
    )
    expected = float((second - first).norm() / first.norm())
    assert relative_distance(base, weights) == pytest.approx(expected, rel=1e-12)
    assert relative_distance(base, base) == 0


def test_bad_weights_have_no_rung() -> None:
    one, zero = {"visual.a": torch.ones(2, 2)}, {"visual.a": torch.zeros(2, 2)}
    assert relative_distance(zero, one) == math.inf
    assert math.isnan(relative_distance(one, {"visual.a": torch.full((2, 2), math.nan)}))
    assert rung_of(math.inf) is None
    assert rung_of(math.nan) is None
    assert "check the weights" in too_far(math.nan)
    # Models that were trained separately.
    assert model_distance(mini_model(0), mini_model(1)) > 1
    assert rung_of(model_distance(mini_model(0), mini_model(1))) is None


def test_a_rung_is_the_nearest_power_of_two() -> None:
    assert rung_of(0.0) == rung_of(1e-9) == 2.0**FIRST_RUNG
    for power in range(FIRST_RUNG, LAST_RUNG + 1):
        for factor in (0.72, 1.0, 1.40):
            assert rung_of(factor * 2.0**power) == 2.0**power or power == FIRST_RUNG
    assert rung_of(2.0**LAST_RUNG * 1.4) == 2.0**LAST_RUNG
    assert rung_of(2.0**LAST_RUNG * 1.5) is None
