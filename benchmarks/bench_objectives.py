"""The objectives and the update of a search: ours, eager PyTorch, torch.compile, and a floor.

    python -m pytest benchmarks/bench_objectives.py

At a search's sizes: 10 triggers, 16 images, 512 dimensions, 10 and 1,000 classes; 8 triggers of
224 pixels for the update. They take turns within one run, and what is compared are medians. The
floor of the update is a copy of the bytes that it must move, that of the zero-shot loss the two
matrix products that it cannot do without; the collapse, which is so small that the overhead of its
calls counts, is measured against reading its embeddings once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.gpu.timing import once
from benchmarks.recording import holds, record
from pydetox import ops
from pydetox.ops import reference

THREADS = 2
TRIGGERS, IMAGES, DIM = 10, 16, 512
SCALE = 100.0


def compare(
    name: str,
    floor_name: str,
    runs: dict[str, Callable[[], object]],
    rounds: int,
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> None:
    """Time `ours`, `eager`, `compiled` and `floor` in turns; print and record what they took."""
    times: dict[str, list[float]] = {which: [] for which in runs}

    def timed(which: str) -> None:
        times[which].append(once(runs[which], device))

    def take_turns() -> None:
        for which in runs:
            if which != "ours":
                timed(which)

    for _ in range(3):
        timed("ours")
        take_turns()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(lambda: timed("ours"), setup=take_turns, rounds=rounds)
    median = {which: statistics.median(measured) for which, measured in times.items()}
    benchmark.extra_info.update({f"{which}_seconds": value for which, value in median.items()})
    with capsys.disabled():
        print(f"\n\n{name}, {THREADS} threads")
        for which, value in median.items():
            label = floor_name if which == "floor" else which
            print(f"  {label:9} {value * 1e6:9.0f} us   {value / median['ours']:6.2f} x ours")
    figures = {
        f"{name}.vs_eager": median["eager"] / median["ours"],
        f"{name}.vs_compile": median["compiled"] / median["ours"],
        f"{name}.over_{floor_name}": median["ours"] / median["floor"],
    }
    for figure, value in figures.items():
        record(figure, value)
    missed = [figure for figure, value in figures.items() if holds(figure, value) is False]
    assert not missed


def embeddings(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(TRIGGERS, IMAGES, DIM, generator=generator).add_(0.5)
    return z.to(device).requires_grad_()


def test_embedding_collapse(
    benchmark: Any, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    torch.set_num_threads(THREADS)
    z = embeddings(device)
    compiled = torch.compile(reference.embedding_collapse, fullgraph=True, dynamic=False)

    def differentiate(collapse: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(collapse(z).sum(), z)

    torch.testing.assert_close(
        differentiate(ops.embedding_collapse), differentiate(reference.embedding_collapse)
    )
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: differentiate(ops.embedding_collapse),
        "eager": lambda: differentiate(reference.embedding_collapse),
        "compiled": lambda: differentiate(compiled),
        "floor": lambda: z.detach().sum(),
    }
    compare("collapse", "read", runs, 200, benchmark, capsys, device)


@pytest.mark.parametrize("classes", [10, 1000])
def test_zero_shot_loss(
    classes: int, benchmark: Any, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    torch.set_num_threads(THREADS)
    z = embeddings(device)
    generator = torch.Generator().manual_seed(1)
    head = normalize(torch.randn(classes, DIM, generator=generator), dim=-1).to(device)
    targets = torch.arange(TRIGGERS, device=device)
    compiled = torch.compile(reference.zero_shot_loss, fullgraph=True, dynamic=False)

    def differentiate(loss: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        value, success = loss(z, head, targets, SCALE)
        return *torch.autograd.grad(value.sum(), z), success

    torch.testing.assert_close(
        differentiate(ops.zero_shot_loss),
        differentiate(reference.zero_shot_loss),
        rtol=1e-4,
        atol=1e-6,
    )
    rows, logits = z.detach().view(-1, DIM), torch.empty(TRIGGERS * IMAGES, classes, device=device)
    gradient = torch.empty_like(rows)

    def products() -> None:
        torch.mm(rows, head.T, out=logits)
        torch.mm(logits, head, out=gradient)

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: differentiate(ops.zero_shot_loss),
        "eager": lambda: differentiate(reference.zero_shot_loss),
        "compiled": lambda: differentiate(compiled),
        "floor": products,
    }
    rounds = 200 if classes < 100 else 60
    compare(f"zero_shot_{classes}", "products", runs, rounds, benchmark, capsys, device)


def test_trigger_update(
    benchmark: Any, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    torch.set_num_threads(THREADS)
    triggers, size = 8, 224
    generator = torch.Generator().manual_seed(0)

    def state() -> list[tuple[Tensor, Tensor]]:
        """Logits, gradients, moments."""
        found = []
        for _ in range(4):
            mask = torch.randn(triggers, size, size, generator=generator).to(device)
            pattern = torch.randn(triggers, 3, size, size, generator=generator).to(device)
            found.append((mask, pattern))
        found[3][0].square_()
        found[3][1].square_()
        return found

    vector = torch.full((triggers,), 0.1, device=device)

    def update_with(operator: Callable[..., Tensor]) -> Callable[[], object]:
        tensors, steps = state(), torch.zeros(triggers, dtype=torch.int64, device=device)
        active = torch.ones(triggers, dtype=torch.bool, device=device)
        return lambda: operator(
            *tensors,
            cost=vector,
            learning_rate=vector,
            steps=steps,
            active=active,
            betas=(0.5, 0.9),
        )

    compiled = torch.compile(reference.trigger_update, fullgraph=True, dynamic=False)
    # Logits and moments are read and written, gradients read; a copy reads and writes each byte.
    source = torch.ones(triggers * 4 * size * size * 7 // 2, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], object]] = {
        "ours": update_with(ops.trigger_update),
        "eager": update_with(reference.trigger_update),
        "compiled": update_with(compiled),
        "floor": lambda: target.copy_(source),
    }
    compare("update_224", "copy", runs, 25, benchmark, capsys, device)
