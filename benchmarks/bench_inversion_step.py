"""One step of trigger inversion on ViT-B-32 against the bare image tower.

    python -m pytest benchmarks/bench_inversion_step.py

The tower's forward pass and its gradient to the pixels, on a batch that is stamped already, are
what no step can do without. The two take turns within one run and medians are compared. The
weights are random: the arithmetic is the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch

from pydetox.inversion import CollapseObjective, InversionConfig, InversionSearch
from pydetox.models import OpenClipModel

THREADS = 2
BATCH = 16
ROUNDS = 7
LARGEST_RATIO = 1.10


@pytest.fixture(scope="module")
def model() -> OpenClipModel:
    config = open_clip.get_model_config("ViT-B-32")
    assert config is not None
    return OpenClipModel.from_config(config, seed=0, name="ViT-B-32")


@pytest.mark.parametrize("triggers", [1, 4])
def test_inversion_step(
    triggers: int, model: OpenClipModel, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8, generator=generator)
    config = InversionConfig(steps=ROUNDS + 1, batch_size=BATCH)
    search = InversionSearch(model, images, CollapseObjective(), config, restarts=triggers)
    stamped = torch.randn(triggers * BATCH, 3, 224, 224, generator=generator).requires_grad_()
    direction = torch.randn(triggers * BATCH, model.embed_dim, generator=generator)
    times: dict[str, list[float]] = {"step": [], "tower": []}

    def timed(name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - start)

    def tower() -> None:
        timed(
            "tower",
            lambda: torch.autograd.grad(model.encode_normalized(stamped), stamped, direction),
        )

    def step() -> None:
        timed("step", search.step)

    step()
    tower()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(step, setup=tower, rounds=ROUNDS)

    median = {name: statistics.median(measured) for name, measured in times.items()}
    ratio = median["step"] / median["tower"]
    benchmark.extra_info.update({f"{name}_seconds": value for name, value in median.items()})
    with capsys.disabled():
        print(
            f"\n\nViT-B-32, 224 px, batch {BATCH}, K = {triggers}, {THREADS} threads: "
            f"step {median['step']:.2f} s, bare tower {median['tower']:.2f} s, ratio {ratio:.3f}"
        )
    assert ratio <= LARGEST_RATIO
