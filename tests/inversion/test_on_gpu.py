"""Searches on a pretended GPU: a step waits for nothing, sends nothing, mixes no devices."""

from __future__ import annotations

import pytest
import torch

from pydetox.inversion import (
    CollapseObjective,
    ContrastObjective,
    InversionConfig,
    InversionSearch,
    TargetObjective,
    WarpConfig,
    invert,
    invert_warps,
)
from pydetox.models import attention, memory
from pydetox.models.frozen import freeze
from tests.mini import CLASS_NAMES, mini_images, mini_model
from tests.pretended import PretendedGpu


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(memory, "_free_on_gpu", lambda device: 1 << 30)
    monkeypatch.setattr(attention, "_chosen", {})
    with PretendedGpu() as pretended:
        yield pretended


def objective_for(model, kind):
    if kind == "label-free":
        return CollapseObjective()
    head = model.zero_shot_head(CLASS_NAMES, ["a {c}"])
    if kind == "targeted":
        return TargetObjective(head, [0, 1, 2], model.logit_scale)
    shares = torch.full((3,), 0.3, device=head.device)
    return ContrastObjective(
        head, head, [0, 1, 2], logit_scale=20.0, base_logit_scale=20.0, base_shares=shares
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["targeted", "label-free", "contrast"])
def test_a_step_waits_for_nothing_and_sends_nothing(gpu, kind, precision):
    model, base = mini_model().to("cuda"), mini_model(1).to("cuda")
    search = InversionSearch(
        model,
        mini_images().images,
        objective_for(model, kind),
        InversionConfig(steps=10, batch_size=4, precision=precision, max_batch=7),
        restarts=3,
        contrast=base if kind == "contrast" else None,
    )
    kernel = "FlashAttention" if precision == "bfloat16" else "memory-efficient attention"
    assert f"{precision}, {kernel}" in search._tower.description
    gpu.syncs.clear()
    gpu.sent = 0
    for _ in range(9):
        search.step()
    assert gpu.syncs == []
    assert gpu.sent == 0
    search.step()  # it ends with a look, which waits once
    assert gpu.syncs == ["tolist"]


def test_the_images_of_a_search_are_sent_once_as_bytes_and_results_are_the_cpus(gpu):
    images = mini_images(40).images
    config = InversionConfig(steps=20, batch_size=4, max_batch=8)
    here = mini_model()
    expected = invert(here, images, objective_for(here, "targeted"), config)
    there = mini_model().to("cuda")
    objective = objective_for(there, "targeted")
    freeze(there.visual)  # tries its attention
    gpu.sent = 0
    found = invert(there, images, objective, config)
    state = 4 * 4 * 3 * 16 * 16  # the first logits of three triggers, float32
    numbers = 8 * (20 * 4 + 40)  # which images are in which step, and in the check
    assert gpu.sent <= images.nbytes + state + numbers + 4096
    torch.testing.assert_close(found.mask_logits.cpu(), expected.mask_logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.p_l1, expected.p_l1)


def test_warps_are_searched_for_without_waiting(gpu):
    model = mini_model().to("cuda")
    images = mini_images(30).images
    objective = objective_for(model, "targeted")
    freeze(model.visual)  # tries its attention
    gpu.sent, waits = 0, []
    for steps in (2, 12):
        gpu.syncs.clear()
        invert_warps(model, images, objective, WarpConfig(steps=steps, batch_size=4))
        waits.append(len(gpu.syncs))
    assert waits[0] == waits[1]  # after the search, not in its steps
    assert gpu.sent < 2 * images.nbytes + 20_000
