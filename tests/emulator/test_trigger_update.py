"""The CUDA kernels of trigger_update, run from their .cuh by the emulator: the CPU's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pydetox import _emulator, ops

Schedule = _emulator.Schedule
Arrays = dict[str, Tensor]
# K, C, H, W
SIZES = [
    (1, 1, 1, 1),
    (3, 3, 7, 5),
    (2, 2, 33, 65),  # two chunks of a mask, and three of a pattern
]
NAMES = ("logits", "gradient", "first", "second")
ORDER = [
    *(f"{part}_{name}" for name in NAMES for part in ("mask", "pattern")),
    *("cost", "learning_rate", "total_variation", "steps", "active"),
    *("best_mask", "best_pattern", "best_norm", "eligible"),
]


def make(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    variation: bool = True,
    best: bool = True,
) -> Arrays:
    triggers, channels, height, width = sizes
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    shapes = {"mask": (triggers, height, width), "pattern": (triggers, channels, height, width)}
    arrays = {f"{part}_{name}": randn(*shapes[part]) for part in shapes for name in NAMES}
    for part in shapes:
        arrays[f"{part}_second"].square_()
    number = torch.arange(triggers)
    arrays |= {
        "cost": 0.1 + number.float(),
        "learning_rate": 0.05 + number.double(),
        "steps": 2 * number,
        "active": number != 1,
    }
    if variation:
        arrays["total_variation"] = 0.2 + number.float()
    if best:
        arrays |= {f"best_{part}": randn(*shapes[part]) for part in shapes}
        arrays["best_norm"] = torch.where(number == 0, torch.inf, 0.0).double()
        arrays["eligible"] = torch.ones(triggers, dtype=torch.bool)
    return arrays


def emulate(arrays: Arrays, schedule: Schedule) -> tuple[Arrays, list[_emulator.Traffic]]:
    """All arrays afterwards, and the norms."""
    after = {name: tensor.clone() for name, tensor in arrays.items()}
    after["norms"], traffic = _emulator.run(
        "trigger_update", *(after.get(name) for name in ORDER), 0.5, 0.9, 1e-8, schedule=schedule
    )
    return after, traffic


def on_the_cpu(arrays: Arrays) -> Arrays:
    after = {name: tensor.clone() for name, tensor in arrays.items()}
    best = None
    if "best_mask" in after:
        best = ops.BestTriggers(
            (after["best_mask"], after["best_pattern"]), after["best_norm"], after["eligible"]
        )
    after["norms"] = ops.trigger_update(
        *((after[f"mask_{name}"], after[f"pattern_{name}"]) for name in NAMES),
        cost=after["cost"],
        learning_rate=after["learning_rate"],
        steps=after["steps"],
        active=after["active"],
        betas=(0.5, 0.9),
        total_variation=after.get("total_variation"),
        best=best,
    )
    return after


def same(ours: Arrays, theirs: Arrays) -> bool:
    return all(
        torch.equal(ours[name].nan_to_num(nan=-5.0), theirs[name].nan_to_num(nan=-5.0))
        for name in theirs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("optional", [False, True])
def test_same_bits_as_the_cpu_operator(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, optional: bool
) -> None:
    arrays = make(sizes, dtype, variation=optional, best=optional)
    expected = on_the_cpu(arrays)
    for seed in range(3):
        found, traffic = emulate(arrays, Schedule(seed=seed))
        assert same(found, expected)
        assert len(traffic) == 3


def test_without_its_barrier_the_norm_is_wrong_in_some_schedule() -> None:
    arrays = make((2, 1, 33, 65))
    expected = on_the_cpu(arrays)
    _, traffic = emulate(arrays, Schedule())
    (line,) = {line for one in traffic for line in one.barriers}
    wrong = 0
    for seed in range(1, 9):
        try:
            found, _ = emulate(arrays, Schedule(seed=seed, dropped_barrier=line))
            wrong += not same(found, expected)
        except _emulator.KernelError:
            wrong += 1
    assert wrong


def test_every_byte_is_moved_once_and_none_of_what_rests() -> None:
    arrays = make((3, 3, 32, 32), variation=False, best=False)
    pixels = 32 * 32
    active = 2  # trigger 1 is not
    _, (masks, plans, triggers) = emulate(arrays, Schedule())
    assert masks.bytes_loaded - 4 * active * pixels <= 3 * 256  # the flags
    assert plans.bytes_loaded + plans.bytes_stored <= 300
    state = 4 * active * 4 * pixels  # one of logits, gradients and moments, in bytes
    assert triggers.bytes_stored == 3 * state
    assert 4 * state <= triggers.bytes_loaded <= 4 * state + 3 * 3 * 256 * 48  # and each's plan
    arrays["active"][:] = False
    found, traffic = emulate(arrays, Schedule())
    assert sum(one.bytes_stored for one in traffic) == 3 * (48 + 8)
    assert found["norms"].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(sizes: tuple[int, int, int, int]) -> None:
    arrays = make(sizes)
    assert same(emulate(arrays, Schedule())[0], on_the_cpu(arrays))


def test_not_finite_values_go_through() -> None:
    arrays = make((3, 2, 6, 7), torch.float64)
    arrays["mask_logits"][0, 0, :3] = torch.tensor([np.nan, np.inf, -np.inf])
    arrays["pattern_gradient"][2, 1, 5, :2] = torch.tensor([np.nan, np.inf])
    assert same(emulate(arrays, Schedule(seed=1))[0], on_the_cpu(arrays))


def test_misaligned_tensors_give_the_same_bits() -> None:
    arrays = make((2, 2, 5, 7))
    expected = on_the_cpu(arrays)
    shifted = {
        name: torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
        for name, t in arrays.items()
    }
    arguments = (*(shifted[name] for name in ORDER), 0.5, 0.9, 1e-8)
    shifted["norms"], _ = _emulator.run("trigger_update", *arguments, schedule=Schedule(seed=1))
    assert same(shifted, expected)
