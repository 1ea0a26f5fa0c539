"""Randomised singular values, against those of the explicit difference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pydetox.analysis.spectra import effective_rank, randomized_svd
from pydetox.errors import ArchitectureError, UsageError

F64 = torch.float64


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64, generator=generator)).Q


def with_spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    count = len(values)
    return orthonormal(rows, count, 1) * values @ orthonormal(columns, count, 2).T


def models(difference: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Zeros and the difference: float64 arithmetic on it is exact then."""
    return {k: torch.zeros_like(v) for k, v in difference.items()}, difference


@pytest.mark.parametrize(("rows", "columns"), [(90, 70), (40, 130), (7, 5), (1, 9), (9, 1)])
def test_a_difference_of_low_rank_comes_back(rows: int, columns: int) -> None:
    true_rank = min(3, rows, columns)
    values = torch.tensor([5.0, 2.0, 0.5], dtype=F64)[:true_rank]
    difference = with_spectrum(rows, columns, values)
    result = randomized_svd(*models({"w": difference}), rank=6, seed=0)["w"]
    count = min(6, rows, columns)
    assert result.left.shape == (rows, count)
    assert result.right.shape == (columns, count)
    assert result.singular_values.shape == (count,)
    torch.testing.assert_close(result.singular_values[:true_rank], values, rtol=1e-13, atol=0)
    assert float(result.singular_values[true_rank:].sum()) < 1e-13
    again = result.left * result.singular_values @ result.right.T
    torch.testing.assert_close(again, difference, rtol=0, atol=1e-13)
    assert result.captured == pytest.approx(1, abs=1e-13)
    assert result.stable_rank == pytest.approx(float(values.square().sum()) / 25)


def test_against_the_svd_of_the_explicit_difference() -> None:
    """float32 weights and a difference in all directions, with singular values like k^-1."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear": (120, 80), "convolution": (64, 3, 6, 6), "wide": (30, 200)}
    base = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    model = {}
    for name, start in base.items():
        rows, columns = start.shape[0], start[0].numel()
        values = 1 / torch.arange(1, min(rows, columns) + 1, dtype=F64)
        model[name] = (start + with_spectrum(rows, columns, values).reshape(start.shape)).float()
    results = randomized_svd(base, model, rank=8, power_iterations=2, seed=1)
    assert list(results) == list(shapes)
    for name, result in results.items():
        difference = (model[name].double() - base[name].double()).flatten(1)
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        torch.testing.assert_close(result.singular_values, s[:8], rtol=2e-3, atol=0)
        assert bool((result.singular_values <= s[:8] * (1 + 1e-12)).all())  # a projection of D
        best = float((difference - u[:, :8] * s[:8] @ vh[:8]).norm())
        found = float((difference - result.left * result.singular_values @ result.right.T).norm())
        assert found <= 1.01 * best
        identity = torch.eye(8, dtype=F64)
        torch.testing.assert_close(result.left.T @ result.left, identity, rtol=0, atol=1e-13)
        torch.testing.assert_close(result.right.T @ result.right, identity, rtol=0, atol=1e-13)
        assert result.energy == pytest.approx(float(s.square().sum()), rel=1e-12)
        assert result.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-6)


def test_power_iterations_help_where_singular_values_fall_slowly() -> None:
    values = torch.arange(1, 101, dtype=F64) ** -0.25
    pair = models({"w": with_spectrum(150, 100, values)})
    errors = []
    for power_iterations in (0, 1, 3):
        found = randomized_svd(*pair, rank=5, power_iterations=power_iterations, seed=0)["w"]
        errors.append(float((values[:5] - found.singular_values).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_all_values_of_a_small_matrix_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(20, 12, dtype=F64, generator=generator)
    result = randomized_svd(*models({"w": difference}), rank=12, power_iterations=0, seed=0)["w"]
    values = torch.linalg.svdvals(difference)
    torch.testing.assert_close(result.singular_values, values, rtol=1e-13, atol=0)
    assert result.effective_rank == pytest.approx(effective_rank(values), rel=1e-12)


def test_which_tensors() -> None:
    base = {
        "matrix": torch.zeros(4, 3),
        "bias": torch.zeros(4),
        "scale": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "steps": torch.zeros(2, 2, dtype=torch.int64),
        "half": torch.ones(5, 2, dtype=torch.float16),
    }
    model = {k: v + 1 for k, v in base.items()}
    results = randomized_svd(base, model, rank=2, seed=0)
    assert list(results) == ["matrix", "half"]
    assert float(results["matrix"].singular_values[0]) == pytest.approx(math.sqrt(12))
    assert randomized_svd({"bias": torch.ones(3)}, {"bias": torch.ones(3)}, rank=1, seed=0) == {}


def test_no_difference() -> None:
    same = {"w": torch.ones(6, 4)}
    result = randomized_svd(same, same, rank=2, seed=0)["w"]
    assert result.singular_values.tolist() == [0, 0]
    assert (result.energy, result.captured) == (0, 1)
    assert (result.stable_rank, result.effective_rank) == (0, 0)


def test_same_seed_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {k: torch.randn(300, 200, generator=generator) for k in "abc"}
    model = {k: torch.randn(300, 200, generator=generator) for k in "abc"}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        one = randomized_svd(base, model, rank=4, seed=3)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        backwards = dict(reversed(base.items()))
        two = randomized_svd(backwards, model, rank=4, seed=3)
    finally:
        torch.set_num_threads(before)
    other = randomized_svd(base, model, rank=4, seed=4)
    for name in "abc":
        assert torch.equal(one[name].singular_values, two[name].singular_values)
        assert torch.equal(one[name].left, two[name].left)
        assert torch.equal(one[name].right, two[name].right)
        assert not torch.equal(one[name].singular_values, other[name].singular_values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_differences_that_are_not_finite_are_refused(value: float) -> None:
    base = {"v": torch.zeros(2, 2), "w": torch.zeros(2, 2)}
    with pytest.raises(UsageError, match="difference of w is not finite"):
        randomized_svd(base, base | {"w": torch.tensor([[0, value], [0, 0]])}, rank=1, seed=0)


def test_wrong_arguments() -> None:
    base = {"w": torch.zeros(2, 2)}
    with pytest.raises(UsageError, match=r"rank must be at least 1.*found 0, 8 and 1"):
        randomized_svd(base, base, rank=0, seed=0)
    with pytest.raises(UsageError, match="found 1, -1 and 1"):
        randomized_svd(base, base, rank=1, oversampling=-1, seed=0)
    with pytest.raises(ArchitectureError, match="no difference between these weights"):
        randomized_svd(base, {"w": torch.zeros(2, 3)}, rank=1, seed=0)
    with pytest.raises(UsageError, match="not negative"):
        effective_rank(torch.tensor([1.0, -1.0]))


def test_effective_rank() -> None:
    assert effective_rank(torch.full((7,), 2.5)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == 1
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.zeros(0)) == 0
    p = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    assert effective_rank(10 * p) == pytest.approx(2**1.5)
