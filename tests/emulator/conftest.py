"""What the tests of the emulator share."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydetox import _emulator

Schedule = _emulator.Schedule


def reserve_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, count * torch.empty(0, dtype=dtype).element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def launch_shape_of_stamping(
    backward: bool, sizes: list[int], box: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """Blocks, threads and shared bytes of a launch. sizes: K, B, C, H, W, patch size."""
    k, b, c, h, w, patch = sizes
    rows, columns = box or (h, w)
    images = reserve_memory((b, c, h, w), torch.uint8)
    mask, pattern = (reserve_memory((k, *s, rows, columns), torch.float32) for s in ((), (c,)))
    output = (k, b, (h // patch) * (w // patch), c * patch**2) if patch else (k, b, c, h, w)
    given = reserve_memory(output, torch.float32)
    corners = None if box is None else reserve_memory((k, 2), torch.int64)
    options = ([0.0] * c, [1.0] * c, patch or None)
    if backward:
        results = [reserve_memory(tuple(t.shape), torch.float32) for t in (mask, pattern)]
        arguments = ("stamp_triggers_backward_out", given, images, mask, pattern, *options)
        _, traffic = _emulator.run(*arguments, *results, corners, schedule=Schedule(dry=True))
    else:
        arguments = ("stamp_triggers_out", images, mask, pattern, *options, given, corners)
        _, traffic = _emulator.run(*arguments, box is not None, schedule=Schedule(dry=True))
    if not traffic:
        return 0, 0, 0
    (launch,) = traffic
    return launch.blocks, launch.threads, launch.shared_bytes


@pytest.fixture
def reserve() -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
    return reserve_memory


@pytest.fixture
def stamp_launch_shape() -> Callable[..., tuple[int, int, int]]:
    return launch_shape_of_stamping
