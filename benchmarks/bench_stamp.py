"""`stamp_triggers`, forward and backward: ours, eager PyTorch, torch.compile, and a plain copy.

    python -m pytest benchmarks/bench_stamp.py

Images shared by all triggers, a batch of images for each trigger, and triggers that fill a box.

Ours is called as the inversion search calls it, with buffers that it keeps from step to step; its
rivals allocate their results, as plain PyTorch code does. The four take turns within one run (ours,
eager, compiled, copy, ours, ...), so that whatever else the machine does hits them alike; what is
compared are medians. The copy moves the bytes that forward and backward must move at least: the
floor for anything that has to read and write them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.timing import once
from benchmarks.recording import holds, record
from pydetox.ops import reference, stamp_triggers, stamp_triggers_gradients

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
THREADS = 2
ROUNDS = 15


@dataclass(frozen=True)
class Problem:
    """Inputs of one call, and the upstream gradient."""

    images: Tensor
    mask: Tensor
    pattern: Tensor
    gradient: Tensor

    @classmethod
    def make(
        cls,
        triggers: int,
        batch: int,
        size: int,
        *,
        own: bool = False,
        box: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Problem:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, size, size)
        images = torch.randint(
            0, 256, (triggers, *shape) if own else shape, dtype=torch.uint8, generator=generator
        )
        side = box or size
        mask = torch.randn(triggers, side, side, generator=generator)
        pattern = torch.randn(triggers, 3, side, side, generator=generator)
        gradient = torch.randn(triggers, *shape, generator=generator)
        images, mask, pattern, gradient = (
            tensor.to(device) for tensor in (images, mask, pattern, gradient)
        )
        return cls(images, mask.requires_grad_(), pattern.requires_grad_(), gradient)

    def forward_and_backward(self, stamp: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        stamped = stamp(self.images, self.mask, self.pattern, mean=MEAN, std=STD)
        return torch.autograd.grad(stamped, (self.mask, self.pattern), self.gradient)


def copy_of(count: int, device: torch.device) -> Callable[[], object]:
    """What moves that many bytes: a copy reads and writes each, half of them in all."""
    source = torch.ones(count // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def take_turns(
    title: str,
    runs: dict[str, Callable[[], object]],
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> dict[str, float]:
    """Run all in turn, print and return the medians in seconds; "ours" is among them."""
    times: dict[str, list[float]] = {name: [] for name in runs}

    def timed(name: str) -> None:
        times[name].append(once(runs[name], device))

    def others() -> None:
        for name in runs:
            if name != "ours":
                timed(name)

    for run in runs.values():
        run()
    benchmark.pedantic(lambda: timed("ours"), setup=others, rounds=ROUNDS)
    median = {name: statistics.median(measured) for name, measured in times.items()}
    benchmark.extra_info.update({f"{name}_seconds": value for name, value in median.items()})
    with capsys.disabled():
        print(f"\n\n{title}, {THREADS} threads")
        for name, value in median.items():
            print(
                f"  {name:9} {value * 1e3:8.1f} ms   {value / median['ours']:5.1f} x ours"
                f"   (fastest {min(times[name]) * 1e3:.1f} ms)"
            )
        print(f"  distance to the copy: {median['ours'] / median['copy']:.1f} x")
    return median


def record_all(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        record(name, value)
    missed = [name for name, value in figures.items() if holds(name, value) is False]
    assert not missed


@pytest.mark.parametrize(
    ("name", "triggers", "batch", "size", "own"),
    [
        ("stamp_224", 8, 16, 224, False),
        ("stamp_64", 64, 16, 64, False),
        ("stamp_own", 8, 16, 224, True),
    ],
    ids=["8x16x3x224", "64x16x3x64", "8x16x3x224-own-images"],
)
def test_whole_images(
    name: str,
    triggers: int,
    batch: int,
    size: int,
    own: bool,
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> None:
    torch.set_num_threads(THREADS)
    p = Problem.make(triggers, batch, size, own=own, device=device)
    compiled = torch.compile(reference.stamp_triggers, fullgraph=True, dynamic=False)
    stamped = torch.empty_like(p.gradient)
    buffers = torch.empty_like(p.mask), torch.empty_like(p.pattern)

    def with_buffers() -> tuple[Tensor, ...]:
        stamp_triggers(p.images, p.mask, p.pattern, mean=MEAN, std=STD, out=stamped)
        return stamp_triggers_gradients(
            p.gradient, p.images, p.mask, p.pattern, mean=MEAN, std=STD, out=buffers
        )

    # At least: the result, its gradient, the inputs twice, the gradients.
    moved = 2 * (p.gradient.nbytes + p.images.nbytes) + 3 * (p.mask.nbytes + p.pattern.nbytes)
    runs: dict[str, Callable[[], object]] = {
        "ours": with_buffers,
        "eager": lambda: p.forward_and_backward(reference.stamp_triggers),
        "compiled": lambda: p.forward_and_backward(compiled),
        "copy": copy_of(moved, device),
    }
    expected = p.forward_and_backward(reference.stamp_triggers)
    for found in (with_buffers(), p.forward_and_backward(compiled)):
        torch.testing.assert_close(tuple(found), expected, rtol=1e-3, atol=1e-4)
    what = " with images for each" if own else ""
    title = f"K x B x C x H x W = {triggers}x{batch}x3x{size}x{size}{what}"
    median = take_turns(title, runs, benchmark, capsys, device)
    record_all(
        {
            f"{name}.vs_eager": median["eager"] / median["ours"],
            f"{name}.vs_compile": median["compiled"] / median["ours"],
            f"{name}.over_copy": median["ours"] / median["copy"],
        }
    )


def test_boxes(benchmark: Any, capsys: pytest.CaptureFixture[str], device: torch.device) -> None:
    """A step on the same images as the one before: only the boxes are written and read.

    Eager PyTorch does the same by slicing: it stamps crops of the images, copies them into the
    buffer, and takes the crops of the upstream gradient.
    """
    torch.set_num_threads(THREADS)
    triggers, batch, size, box = 8, 16, 224, 64
    p = Problem.make(triggers, batch, size, box=box, device=device)
    corners = torch.tensor([(19 * k % 160, 31 * k % 160) for k in range(triggers)])
    places = [(slice(top, top + box), slice(left, left + box)) for top, left in corners.tolist()]
    options: dict[str, Any] = {"mean": MEAN, "std": STD, "corners": corners.to(device)}
    stamped = torch.empty_like(p.gradient)
    buffers = torch.empty_like(p.mask), torch.empty_like(p.pattern)
    stamp_triggers(p.images, p.mask, p.pattern, **options, out=stamped)
    by_eager = stamped.clone()

    def ours() -> tuple[Tensor, ...]:
        stamp_triggers(p.images, p.mask, p.pattern, **options, out=stamped, only_box=True)
        return stamp_triggers_gradients(
            p.gradient, p.images, p.mask, p.pattern, **options, out=buffers
        )

    def eager() -> tuple[Tensor, ...]:
        crops = torch.stack([p.images[..., rows, columns] for rows, columns in places])
        boxes = reference.stamp_triggers(crops, p.mask, p.pattern, mean=MEAN, std=STD)
        for k, (rows, columns) in enumerate(places):
            by_eager[k, ..., rows, columns] = boxes[k].detach()
        upstream = [p.gradient[k, ..., rows, columns] for k, (rows, columns) in enumerate(places)]
        return torch.autograd.grad(boxes, (p.mask, p.pattern), torch.stack(upstream))

    torch.testing.assert_close(tuple(ours()), eager(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stamped, by_eager, rtol=1e-3, atol=1e-4)
    pixels = triggers * batch * 3 * box**2
    # The boxes of the result (float32), of its gradient, and of the images (uint8) twice.
    moved = pixels * (2 * 4 + 2) + 3 * (p.mask.nbytes + p.pattern.nbytes)
    whole = Problem.make(triggers, batch, size, device=device)
    whole_buffers = torch.empty_like(whole.mask), torch.empty_like(whole.pattern)

    def whole_images() -> None:
        stamp_triggers(whole.images, whole.mask, whole.pattern, mean=MEAN, std=STD, out=by_eager)
        stamp_triggers_gradients(
            whole.gradient,
            whole.images,
            whole.mask,
            whole.pattern,
            mean=MEAN,
            std=STD,
            out=whole_buffers,
        )

    runs = {"ours": ours, "eager": eager, "whole": whole_images, "copy": copy_of(moved, device)}
    title = f"Boxes of {box}x{box} in {triggers}x{batch}x3x{size}x{size}"
    median = take_turns(title, runs, benchmark, capsys, device)
    record_all(
        {
            "stamp_box.vs_eager": median["eager"] / median["ours"],
            "stamp_box.vs_whole": median["whole"] / median["ours"],
            "stamp_box.over_copy": median["ours"] / median["copy"],
        }
    )


# Linux counts the most that a process has ever held; writing 5 starts the count anew.
PEAK = """
import torch
from benchmarks.bench_stamp import Problem
from pydetox.ops import stamp_triggers

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

torch.set_num_threads(2)
Problem.make(2, 2, 32).forward_and_backward(stamp_triggers)  # threads, code
p = Problem.make(8, 16, 224)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
gradients = p.forward_and_backward(stamp_triggers)
print((status("VmHWM") - before) * 1024 / p.gradient.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(capsys: pytest.CaptureFixture[str], device: torch.device) -> None:
    """Of a forward and a backward pass, over the result; the upstream gradient was there before."""
    if device.type == "cuda":
        p = Problem.make(8, 16, 224, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        p.forward_and_backward(stamp_triggers)
        extra = torch.cuda.max_memory_allocated(device) - before
        record_all({"stamp_224.peak_over_output": extra / p.gradient.nbytes})
        return
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    peak = float(run.stdout)
    with capsys.disabled():
        print(f"\n\npeak memory of 8x16x3x224x224: {peak:.3f} x the result")
    record_all({"stamp_224.peak_over_output": peak})
