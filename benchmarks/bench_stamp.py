"""`stamp_triggers`, forward and backward: ours, eager PyTorch, torch.compile, and a plain copy.

    python -m pytest benchmarks/bench_stamp.py

Ours is called as the inversion search calls it, with buffers that it keeps from step to step; its
rivals allocate their results, as plain PyTorch code does. The four take turns within one run (ours,
eager, compiled, copy, ours, ...), so that whatever else the machine does hits them alike; what is
compared are medians. The copy moves the bytes that forward and backward must move at least: the
floor for anything that has to read and write them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.recording import holds, record
from pydetox.ops import reference, stamp_triggers, stamp_triggers_gradients

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
THREADS = 2
ROUNDS = 15


def forward_and_backward(
    stamp: Callable[..., Tensor], images: Tensor, mask: Tensor, pattern: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    stamped = stamp(images, mask, pattern, mean=MEAN, std=STD)
    return torch.autograd.grad(stamped, (mask, pattern), gradient)


def bytes_moved(images: Tensor, mask: Tensor, pattern: Tensor, gradient: Tensor) -> int:
    """Bytes to read and write at least: the result, its gradient, inputs twice, gradients."""
    return 2 * gradient.nbytes + 2 * images.nbytes + 3 * (mask.nbytes + pattern.nbytes)


@pytest.mark.parametrize(
    ("triggers", "batch", "size"), [(8, 16, 224), (64, 16, 64)], ids=["8x16x3x224", "64x16x3x64"]
)
def test_stamp_triggers(
    triggers: int,
    batch: int,
    size: int,
    benchmark: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    mask = torch.randn(triggers, size, size, generator=generator).requires_grad_()
    pattern = torch.randn(triggers, 3, size, size, generator=generator).requires_grad_()
    gradient = torch.randn(triggers, batch, 3, size, size, generator=generator)
    arguments = (images, mask, pattern, gradient)

    # A copy reads and writes each byte: half of what is moved in all.
    source = torch.ones(bytes_moved(*arguments) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    compiled = torch.compile(reference.stamp_triggers, fullgraph=True, dynamic=False)
    others: dict[str, Callable[[], object]] = {
        "eager": lambda: forward_and_backward(reference.stamp_triggers, *arguments),
        "compiled": lambda: forward_and_backward(compiled, *arguments),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}

    def timed(name: str, run: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = run()
        times[name].append(time.perf_counter() - start)
        return result

    stamped = torch.empty_like(gradient)
    buffers = torch.empty(mask.shape), torch.empty(pattern.shape)

    def with_buffers() -> tuple[Tensor, ...]:
        stamp_triggers(images, mask, pattern, mean=MEAN, std=STD, out=stamped)
        return stamp_triggers_gradients(
            gradient, images, mask, pattern, mean=MEAN, std=STD, out=buffers
        )

    def ours() -> object:
        return timed("ours", with_buffers)

    def take_turns() -> None:
        for name, run in others.items():
            timed(name, run)

    expected = forward_and_backward(reference.stamp_triggers, *arguments)
    for run in (ours, others["compiled"]):
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    others["copy"]()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(ours, setup=take_turns, rounds=ROUNDS)

    median = {name: statistics.median(measured) for name, measured in times.items()}
    speedup = {name: median[name] / median["ours"] for name in ("eager", "compiled")}
    benchmark.extra_info.update({f"{name}_seconds": value for name, value in median.items()})
    with capsys.disabled():
        print(f"\n\nK x B x C x H x W = {triggers}x{batch}x3x{size}x{size}, {THREADS} threads")
        for name, value in median.items():
            print(
                f"  {name:9} {value * 1e3:8.1f} ms   {value / median['ours']:5.1f} x ours"
                f"   (fastest {min(times[name]) * 1e3:.1f} ms)"
            )
        print(f"  distance to the copy: {median['ours'] / median['copy']:.1f} x")
    figures = {
        "vs_eager": speedup["eager"],
        "vs_compile": speedup["compiled"],
        "over_copy": median["ours"] / median["copy"],
    }
    figures = {f"stamp_{size}.{figure}": value for figure, value in figures.items()}
    for name, value in figures.items():
        record(name, value)
    missed = [name for name, value in figures.items() if holds(name, value) is False]
    assert not missed
