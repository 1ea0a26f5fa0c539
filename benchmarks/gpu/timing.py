"""Medians of times: CUDA events on a GPU, the clock on a CPU. Always after a warm-up."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
#: About that of the fastest GPU; only decides how long the queue is held up.
_CYCLES_PER_SECOND = 2e9


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Call, device: torch.device) -> float:
    """Return the seconds of one call, from its start until the device is done."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def device_seconds(
    calls: Sequence[Call], device: torch.device, *, budget: float = 0.25, tiny: bool = False
) -> float:
    """Return what one call takes the device: the median over rounds of calls that take turns.

    The calls do the same on different memory, so that none finds its inputs in the cache. A round
    waits in the device's queue until all of it has been launched: what the launches take of the CPU
    does not count. On a CPU it does.
    """
    for call in calls:
        call()
    one = max(1e-6, once(calls[0], device))
    if device.type != "cuda":
        return _by_clock(calls, device, one, budget, tiny)
    # Long enough for the events' resolution, short enough for the queue.
    size = max(1, min(32, int(2e-3 / one)))
    rounds = 2 if tiny else max(7, min(100, int(budget / (one * size))))
    pairs = []
    number = 0
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if one < 1e-2:
            # `one` is longer than a launch, which can take the CPU milliseconds: a call with
            # lists of thousands of tensors takes about a microsecond for each.
            torch.cuda._sleep(int(_CYCLES_PER_SECOND * (1.5 * one + 1e-4) * size))
        begin.record()
        for _ in range(size):
            calls[number % len(calls)]()
            number += 1
        end.record()
        pairs.append((begin, end))
    wait(device)
    middle: float = statistics.median(a.elapsed_time(b) for a, b in pairs)  # milliseconds
    return middle / 1e3 / size


def paced_seconds(
    call: Call,
    device: torch.device,
    *,
    budget: float = 0.8,
    least: int = 5,
    most: int = 100,
    tiny: bool = False,
) -> float:
    """Return what one call after another takes: whatever is slower, the device or its launches.

    The median of the times between the calls' ends on the device.
    """
    for _ in range(2):
        call()
    one = max(1e-6, once(call, device))
    count = 2 if tiny else max(least, min(most, int(budget / one)))
    if device.type != "cuda":
        return statistics.median(once(call, device) for _ in range(count))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    wait(device)
    middle: float = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return middle / 1e3


def _by_clock(
    calls: Sequence[Call], device: torch.device, one: float, budget: float, tiny: bool
) -> float:
    count = 2 if tiny else max(5, min(200, int(budget / one)))
    return statistics.median(once(calls[i % len(calls)], device) for i in range(count))
