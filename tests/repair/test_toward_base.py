"""The optimiser that stays between suspect and base, beside the closed form of a quadratic."""

from __future__ import annotations

import pytest
import torch

from pydetox.errors import UsageError
from pydetox.repair.toward_base import TowardBase
from pydetox.training import optimize


def _reached(
    start: torch.Tensor,
    base: torch.Tensor,
    wanted: torch.Tensor,
    *,
    scale: float = 1.0,
    steps: int = 400,
) -> torch.Tensor:
    """Return where sum(scale * (w - wanted)^2) ends."""
    weight = torch.nn.Parameter(start.clone())
    optimize(
        [weight],
        lambda _: (scale * (weight - wanted) ** 2).sum(),
        iter([torch.arange(1)] * steps),
        steps=steps,
        learning_rate=0.1,
        description="test",
        optimizer=TowardBase([weight], [base]),
    )
    return weight.detach()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_optimum_between_suspect_and_base_is_found(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    start, base, wanted = torch.randn(3, 5, 7, generator=rng)
    base[0] = start[0]  # shared weights
    found = _reached(start, base, wanted, scale=scale)
    closest = wanted.clamp(torch.minimum(start, base), torch.maximum(start, base))
    assert torch.equal(found[0], start[0])
    torch.testing.assert_close(found, closest, atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_weight_leaves_the_way(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    start, base, wanted = torch.randn(3, 400, generator=rng, dtype=torch.float64).to(dtype)
    found = _reached(start, base, wanted, steps=50).double()
    rounding = 2 * torch.finfo(dtype).eps * (1 + start.double().abs() + base.double().abs())
    assert bool((found >= torch.minimum(start, base).double() - rounding).all())
    assert bool((found <= torch.maximum(start, base).double() + rounding).all())
    assert not torch.equal(found, start.double())


def test_weights_without_a_gradient_stay_and_other_shapes_are_refused() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = TowardBase([used, unused], [torch.zeros(2), torch.zeros(2)])
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert bool((used < 1).all())
    with pytest.raises(UsageError, match="other tensors"):
        TowardBase([used], [torch.zeros(3)])
