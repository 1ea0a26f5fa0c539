"""One step of trigger inversion against the image tower alone.

    python -m pytest benchmarks/bench_inversion_step.py

What no step can do without is the tower's forward pass and the gradient of its input, on a batch
that is stamped already: in open_clip's own module, and as `pydetox.models.frozen` runs it. The
three take turns within one run and medians are compared. The weights are random: the arithmetic is
the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch

from benchmarks.recording import holds, record
from pydetox.demo import MINI_CLIP
from pydetox.inversion import CollapseObjective, InversionConfig, InversionSearch
from pydetox.models import OpenClipModel
from pydetox.models.frozen import freeze
from pydetox.ops.reference import to_patch_rows

THREADS = 2
BATCH = 16
#: The step over open_clip's module.
LARGEST_RATIO = 1.10


@pytest.mark.parametrize(
    ("name", "triggers", "rounds"), [("vit_b32", 1, 7), ("vit_b32", 4, 7), ("mini", 10, 60)]
)
def test_inversion_step(
    name: str, triggers: int, rounds: int, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(THREADS)
    config = MINI_CLIP if name == "mini" else open_clip.get_model_config("ViT-B-32")
    assert config is not None
    model = OpenClipModel.from_config(config, seed=0, name=name)
    size, count = model.image_size, triggers * BATCH
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8, generator=generator)
    search = InversionSearch(
        model,
        images,
        CollapseObjective(),
        InversionConfig(steps=rounds + 1, batch_size=BATCH),
        restarts=triggers,
    )
    stamped = torch.randn(count, 3, size, size, generator=generator).requires_grad_()
    direction = torch.randn(count, model.embed_dim, generator=generator)
    tower = freeze(model.visual)
    assert tower.patch_size is not None
    rows = to_patch_rows(stamped.detach(), tower.patch_size).requires_grad_()
    times: dict[str, list[float]] = {"step": [], "tower": [], "module": []}

    def timed(which: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        times[which].append(time.perf_counter() - start)

    def take_turns() -> None:
        timed("tower", lambda: torch.autograd.grad(tower(rows), rows, direction))
        timed(
            "module",
            lambda: torch.autograd.grad(model.encode_normalized(stamped), stamped, direction),
        )

    def step() -> None:
        timed("step", search.step)

    step()
    take_turns()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(step, setup=take_turns, rounds=rounds)

    median = {which: statistics.median(measured) for which, measured in times.items()}
    overhead = median["step"] / median["tower"] - 1
    ratio = median["step"] / median["module"]
    benchmark.extra_info.update({f"{which}_seconds": value for which, value in median.items()})
    with capsys.disabled():
        print(
            f"\n\n{name}, {size} px, batch {BATCH}, K = {triggers}, {THREADS} threads: step "
            f"{median['step'] * 1e3:.1f} ms, {ratio:.2f} x open_clip's module "
            f"({median['module'] * 1e3:.1f} ms), {overhead:.1%} over the frozen tower "
            f"({median['tower'] * 1e3:.1f} ms)"
        )
    record(f"step_{name}.k{triggers}.over_module", ratio)
    assert ratio <= LARGEST_RATIO
    if triggers > 1:
        record(f"step_{name}.overhead", overhead)
        assert holds(f"step_{name}.overhead", overhead)
