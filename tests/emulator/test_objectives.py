"""The CUDA kernels of the objectives, run from their .cuh by the emulator.

The collapse must be the CPU's, bit for bit. The zero-shot loss adds up in another order than on the
CPU: there the truth is the reference in float64, and the bits must not depend on the schedule.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pydetox import _emulator, ops
from pydetox.ops import reference

Schedule = _emulator.Schedule
SCHEDULES = [Schedule(), Schedule(seed=1), Schedule(seed=2)]
F32, F64 = torch.float32, torch.float64
# K, B, D, C
SIZES = [
    (1, 2, 1, 1),
    (3, 5, 7, 4),  # more than one block of rows, the last one not full
    (2, 3, 300, 70),  # two rounds of dimensions, two tiles of classes
    (1, 4, 33, 64),
]


def make(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    triggers, images, dim, classes = sizes
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(triggers, images, dim, dtype=F64, generator=generator) + 0.5
    head = normalize(torch.randn(classes, dim, dtype=F64, generator=generator), dim=-1)
    targets = torch.randint(0, classes, (triggers,), generator=generator)
    upstream = torch.randn(triggers, dtype=F64, generator=generator)
    return z.to(dtype), head.to(dtype), targets, upstream.to(dtype)


def collapse(z: Tensor, upstream: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, list]:
    cosine, forward = _emulator.run("embedding_collapse", z, schedule=schedule)
    gradient, traffic = _emulator.run("embedding_collapse_backward", upstream, z, schedule=schedule)
    assert len(forward) <= 2  # which the backward operator does again
    return cosine, gradient, traffic


def zero_shot(
    z: Tensor,
    head: Tensor,
    targets: Tensor,
    schedule: Schedule,
    scale: float = 20.0,
    with_gradient: bool = True,
) -> tuple[list[Tensor], list]:
    arguments = (z, head, targets, scale, with_gradient)
    (loss, success, gradient), traffic = _emulator.run(
        "zero_shot_loss", *arguments, schedule=schedule
    )
    return [loss, success, *([gradient] if with_gradient else [])], traffic


def differentiate(
    module, z: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    leaf = z.to(dtype).clone().requires_grad_()
    loss, success = module.zero_shot_loss(leaf, head.to(dtype), targets, 20.0)
    return [loss.detach(), success, torch.autograd.grad(loss.sum(), leaf)[0]]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_collapse_has_the_bits_of_the_cpu(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    z, _, _, upstream = make(sizes, dtype)
    z[0, 0] = 0
    leaf = z.clone().requires_grad_()
    expected = ops.embedding_collapse(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf, upstream)
    for schedule in SCHEDULES:
        found = collapse(z, upstream, schedule)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], gradient)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_zero_shot_loss(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    z, head, targets, _ = make(sizes, dtype)
    truth = differentiate(reference, z, head, targets, F64)
    plain = differentiate(reference, z, head, targets, dtype)
    found, _ = zero_shot(z, head, targets, SCHEDULES[0])
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        slack = 8 * torch.finfo(dtype).eps * (20 + exact.abs().max())
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + slack
    for schedule in SCHEDULES[1:]:
        again, _ = zero_shot(z, head, targets, schedule)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    without, _ = zero_shot(z, head, targets, SCHEDULES[1], with_gradient=False)
    assert all(torch.equal(a, b) for a, b in zip(without, found, strict=False))


def test_many_dimensions_take_a_row_at_a_time() -> None:
    z, head, targets, _ = make((1, 2, 1600, 3), F32)
    truth = differentiate(reference, z, head, targets, F64)
    found, _ = zero_shot(z, head, targets, Schedule(seed=1))
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"at most .* dimensions on CUDA"):
        zero_shot(*make((1, 1, 7000, 1), F32)[:3], Schedule())


def test_special_rows_and_targets() -> None:
    z, head, targets, _ = make((4, 3, 9, 5), F64)
    z[0, 1] = 0
    z[1, 2, 3] = math.nan
    z[2, 0, 0] = math.inf
    targets[0] = 0
    truth = differentiate(ops, z, head, targets, F64)
    found, _ = zero_shot(z, head, targets, Schedule(seed=3))
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, exact, equal_nan=True)
    assert not found[2][0, 1].any()
    for wrong in (-1, 5):
        targets[3] = wrong
        (loss, success, gradient), _ = zero_shot(z, head, targets, Schedule())
        assert loss[3].isnan()
        assert success[3] == 0
        assert gradient[3].isnan().all()
        assert loss[0].isfinite()


def test_scale() -> None:
    z, _, _, upstream = make((3, 5, 7, 1), F32)
    arguments = (upstream, z, z)
    scaled, _ = _emulator.run("zero_shot_loss_backward", *arguments, schedule=Schedule(seed=1))
    assert torch.equal(scaled, upstream[:, None, None] * z)


def test_nothing() -> None:
    z, head, targets, upstream = make((0, 2, 4, 3), F32)
    assert collapse(z, upstream, Schedule())[2] == []
    assert zero_shot(z, head, targets, Schedule())[1] == []


def test_no_barrier_can_be_spared() -> None:
    z, head, targets, upstream = make((2, 3, 300, 130), F32)
    runs = [
        (lambda s: collapse(z, upstream, s)[:2], lambda: collapse(z, upstream, Schedule())[2], 1),
        (
            lambda s: zero_shot(z, head, targets, s)[0],
            lambda: zero_shot(z, head, targets, Schedule())[1],
            4,
        ),
    ]
    for run, traffic, count in runs:
        lines = {line for one in traffic() for line in one.barriers}
        assert len(lines) == count
        expected = run(Schedule())
        for line in lines:
            wrong = 0
            for seed in range(1, 9):
                try:
                    found = run(Schedule(seed=seed, dropped_barrier=line))
                    wrong += not all(
                        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
                    )
                except _emulator.KernelError:
                    wrong += 1
                if wrong:
                    break
            assert wrong, f"the barrier at line {line} is never missed"


def test_bytes() -> None:
    """The head is read twice for every four rows, and no logit is written."""
    z, head, targets, upstream = make((2, 4, 64, 100), F32)
    norms, sums, gradients = collapse(z, upstream, Schedule())[2]
    assert norms.bytes_loaded == z.nbytes
    assert sums.bytes_loaded == z.nbytes + 8 * (z.numel() + 2 * 4)  # and an inverse norm each
    assert gradients.bytes_stored == z.nbytes
    norms, rows, _ = zero_shot(z, head, targets, Schedule())[1]
    assert norms.bytes_loaded == z.nbytes
    small = 8 * 32 * (8 + 8)  # inverse norms and targets, which all lanes of a warp ask for
    targets_rows = 8 * 2 * 64 * 4
    assert rows.bytes_loaded == z.nbytes + 2 * 2 * head.nbytes + small + targets_rows
    assert rows.bytes_stored == z.nbytes + 8 * (8 + 1)
