"""mix_tokens, its update and top_swaps: ours, eager PyTorch, and the least that they can take.

    python -m pytest benchmarks/bench_tokens.py

Vocabularies of 30,522 (BERT) and 128,000 tokens, 384 and 768 dimensions, 8 to 256 rows. All take
turns within one run, and what is compared are medians. The floor of a forward and a backward pass
is what takes longer: reading the table and the logits twice and writing the gradient, or the two
matrix products alone (`torch.mm` into memory that is there). A bfloat16 table is widened by eager
PyTorch in every call, as plain code does; its floor is that of a float32 table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.timing import once
from benchmarks.recording import holds, record
from pydetox import ops
from pydetox.ops import reference

THREADS = 2
ROUNDS = 7
TEMPERATURE = 0.7
SIZES = [
    (tokens, dim, rows)
    for tokens in (30_522, 128_000)
    for dim in (384, 768)
    for rows in (8, 64, 256)
]
Run = Callable[[], object]


class Problem:
    """Logits, a table and an upstream gradient."""

    def __init__(
        self,
        tokens: int,
        dim: int,
        rows: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        allowed: float | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(rows, tokens, generator=generator).to(device).requires_grad_()
        self.table = (0.05 * torch.randn(tokens, dim, generator=generator)).to(device, dtype)
        self.gradient = torch.randn(rows, dim, generator=generator).to(device)
        self.allowed: Tensor | None = None
        if allowed is not None:
            self.allowed = (torch.rand(tokens, generator=generator) < allowed).to(device)

    def mix(self, module: Any) -> tuple[Tensor, ...]:
        """Return the mixed embeddings and the gradient of the logits."""
        mixed = module.mix_tokens(self.logits, self.table, TEMPERATURE, self.allowed)
        return mixed.detach(), *torch.autograd.grad(mixed, self.logits, self.gradient)

    def floors(self) -> dict[str, Run]:
        """Return what a forward and a backward pass cannot do without."""
        table, logits = self.table.float(), self.logits.detach()
        weights = logits.softmax(dim=-1)
        mixed, products = torch.empty_like(self.gradient), torch.empty_like(logits)

        def read() -> None:
            for _ in range(2):
                self.table.sum()
                logits.sum()
            products.zero_()

        def multiply() -> None:
            torch.mm(weights, table, out=mixed)
            torch.mm(self.gradient, table.T, out=products)

        return {"read": read, "products": multiply}


def in_turns(runs: dict[str, Run], device: torch.device) -> dict[str, float]:
    """Return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            seconds = once(run, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(measured) for name, measured in times.items()}


def report(name: str, median: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    """Print what was measured, record the ratios and check their bounds."""
    ours = median["ours"]
    with capsys.disabled():
        print(f"\n\n{name}, {THREADS} threads")
        for which, value in median.items():
            print(f"  {which:9} {value * 1e3:9.2f} ms   {value / ours:6.2f} x ours")
    figures = {f"{name}.vs_eager": median["eager"] / ours}
    floors = [median[floor] for floor in ("read", "products") if floor in median]
    if floors:
        figures[f"{name}.over_floor"] = ours / max(floors)
    for figure, value in figures.items():
        record(figure, value)
    missed = [figure for figure, value in figures.items() if holds(figure, value) is False]
    assert not missed


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mixing(
    sizes: tuple[int, int, int], capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    torch.set_num_threads(THREADS)
    tokens, dim, rows = sizes
    p = Problem(*sizes, device)
    for ours, theirs in zip(p.mix(ops), p.mix(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    runs: dict[str, Run] = {
        "ours": lambda: p.mix(ops),
        "eager": lambda: p.mix(reference),
        **p.floors(),
    }
    report(f"mix_{tokens // 1000}k_d{dim}_r{rows}", in_turns(runs, device), capsys)


@pytest.mark.parametrize("kind", ["bf16", "allowed"])
def test_mixing_of_narrow_and_of_few_embeddings(
    kind: str, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    torch.set_num_threads(THREADS)
    narrow = kind == "bf16"
    dtype = torch.bfloat16 if narrow else torch.float32
    p = Problem(30_522, 768, 64, device, dtype, None if narrow else 0.6)
    runs: dict[str, Run] = {
        "ours": lambda: p.mix(ops),
        "eager": lambda: p.mix(reference),
        **p.floors(),
    }
    report(f"mix_{kind}", in_turns(runs, device), capsys)


def test_update(capsys: pytest.CaptureFixture[str], device: torch.device) -> None:
    """A step of the search: the mixture, and Adam on its logits."""
    torch.set_num_threads(THREADS)
    p = Problem(30_522, 384, 64, device)
    rows = len(p.gradient)

    def step_with(module: Any) -> Run:
        logits = p.logits.detach().clone()
        first, second = torch.zeros_like(logits), torch.zeros_like(logits)
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        rate = torch.full((rows,), 0.1, device=device)
        active = torch.ones(rows, dtype=torch.bool, device=device)

        def step() -> None:
            mixture = ops.TokenMixture(*module.mix_tokens_forward(logits, p.table, TEMPERATURE))
            module.mix_tokens_update(
                p.gradient,
                mixture,
                logits,
                first,
                second,
                p.table,
                TEMPERATURE,
                learning_rate=rate,
                steps=steps,
                active=active,
                betas=(0.5, 0.9),
            )

        return step

    def eager() -> Run:
        """As one writes it: autograd, then torch's own Adam."""
        leaf = p.logits.detach().clone().requires_grad_()
        adam = torch.optim.Adam([leaf], lr=0.1, betas=(0.5, 0.9))

        def step() -> None:
            mixed = reference.mix_tokens(leaf, p.table, TEMPERATURE)
            adam.zero_grad()
            mixed.backward(p.gradient)
            adam.step()

        return step

    runs = {"ours": step_with(ops), "eager": eager()}
    report("mix_update", in_turns(runs, device), capsys)


@pytest.mark.parametrize("rows", [8, 64])
def test_top_swaps(rows: int, capsys: pytest.CaptureFixture[str], device: torch.device) -> None:
    torch.set_num_threads(THREADS)
    p = Problem(30_522, 768, rows, device)
    current = torch.arange(rows, device=device)
    k = 256

    def eager() -> object:
        products = p.gradient @ p.table.T
        return (products - products.gather(1, current[:, None])).topk(k, largest=False)

    products = torch.empty(rows, len(p.table), device=device)
    runs: dict[str, Run] = {
        "ours": lambda: ops.top_swaps(p.gradient, p.table, current, None, k),
        "eager": eager,
        "read": lambda: p.table.sum(),
        "products": lambda: torch.mm(p.gradient, p.table.T, out=products),
    }
    report(f"top_swaps_r{rows}", in_turns(runs, device), capsys)
