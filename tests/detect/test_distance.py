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
    rungs_around,
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
    assert rungs_around(math.inf) is None
    assert rungs_around(math.nan) is None
    assert "check the weights" in too_far(math.nan)
    # Models that were trained separately.
    assert model_distance(mini_model(0), mini_model(1)) > 1
    assert rungs_around(model_distance(mini_model(0), mini_model(1))) is None


def test_two_rungs_lie_around_a_distance() -> None:
    first, last = 2.0**FIRST_RUNG, 2.0**LAST_RUNG
    for nothing in (0.0, 1e-9, first):
        assert rungs_around(nothing) == {first: 1, 2 * first: 0}
    for much in (last, 1.4 * last):
        assert rungs_around(much) == {last / 2: 0, last: 1}
    assert rungs_around(1.5 * last) is None
    generator = torch.Generator().manual_seed(0)
    for place in torch.empty(50).uniform_(FIRST_RUNG, LAST_RUNG, generator=generator).tolist():
        found = rungs_around(2.0**place)
        assert found is not None
        (below, low), (above, high) = found.items()
        assert above == 2 * below
        assert low + high == pytest.approx(1)
        assert below**low * above**high == pytest.approx(2.0**place)
