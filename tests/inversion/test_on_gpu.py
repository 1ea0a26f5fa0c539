"""Searches on a pretended GPU: a step waits for nothing, sends nothing, mixes no devices."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pydetox.detect.configuration import ScanConfig
from pydetox.detect.key import calibration_key, fingerprint
from pydetox.inversion import (
    CollapseObjective,
    ContrastObjective,
    InversionConfig,
    InversionSearch,
    TargetObjective,
    WarpConfig,
    graph,
    invert,
    invert_warps,
)
from pydetox.inversion.configuration import AdvancedInversionConfig
from pydetox.models import attention, memory
from pydetox.models.frozen import freeze, resolve_precision
from pydetox.models.products import tf32_products
from pydetox.session import Session
from tests.mini import CLASS_NAMES, mini_images, mini_model
from tests.pretended import PretendedGpu
from tests.recorded import OperatorRecorder


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(memory, "_free_on_gpu", lambda device: 1 << 30)
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_that_are_replayed_wait_for_nothing_and_have_the_same_bits(
    gpu, monkeypatch, precision
):
    recorder = OperatorRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    found = []
    for cuda_graph in (False, True):
        model = mini_model().to("cuda")
        config = InversionConfig(
            steps=12,
            batch_size=4,
            precision=precision,
            max_batch=7,
            advanced=AdvancedInversionConfig(cuda_graph=cuda_graph),
        )
        objective = objective_for(model, "targeted")
        search = InversionSearch(model, mini_images().images, objective, config)
        for _ in range(2):  # the second one is recorded, and tried
            search.step()
        gpu.syncs.clear()
        gpu.sent = 0
        for _ in range(7):
            search.step()
        assert (gpu.syncs, gpu.sent) == ([], 0)
        while not search.done:
            search.step()
        found.append(search.result())
    assert (len(recorder.recordings), search._graph.replayed) == (1, 11)
    for name in ("mask_logits", "pattern_logits", "p_l1"):
        assert torch.equal(getattr(found[0], name).cpu(), getattr(found[1], name).cpu())


def test_where_nothing_can_be_captured_the_result_says_so(gpu):
    model = mini_model().to("cuda")
    config = InversionConfig(steps=2, batch_size=4, precision="float32")
    found = invert(model, mini_images().images, objective_for(model, "targeted"), config)
    assert "; no CUDA graph: " in found.tower  # this machine has no GPU


def test_the_images_of_a_search_are_sent_once_as_bytes_and_results_are_the_cpus(gpu):
    images = mini_images(40).images
    config = InversionConfig(steps=20, batch_size=4, max_batch=8, precision="float32")
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
        invert_warps(
            model, images, objective, WarpConfig(steps=steps, batch_size=4, precision="float32")
        )
        waits.append(len(gpu.syncs))
    assert waits[0] == waits[1]  # after the search, not in its steps
    assert gpu.sent < 2 * images.nbytes + 20_000


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float32")]
)
def test_auto_is_bfloat16_where_a_gpu_has_it_and_the_key_says_which(
    gpu, monkeypatch, capability, precision
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = ScanConfig(inversion=InversionConfig(steps=2))
    assert config.inversion.precision == "auto"
    here, there = mini_model(), mini_model().to("cuda")
    images = mini_images()
    found = invert(there, images.images, CollapseObjective(), config.inversion)
    assert found.tower.startswith(f"frozen vision transformer, {precision}, ")
    assert found.tower.endswith("training and prediction in TF32")
    on_cpu = invert(here, images.images, CollapseObjective(), config.inversion)
    assert "float32" in on_cpu.tower
    assert "TF32" not in on_cpu.tower
    key = calibration_key(config, Session.open(there, images), "patch")
    assert json.loads(key)["precision"] == precision
    same = replace(config, inversion=replace(config.inversion, precision=precision))
    assert calibration_key(same, Session.open(there, images), "patch") == key
    ours = calibration_key(config, Session.open(here, images), "patch")
    assert json.loads(ours)["precision"] == "float32"


def test_auto_is_float32_for_a_tower_that_runs_through_its_module(gpu):
    other = torch.nn.Linear(2, 2)
    cuda = torch.device("cuda", 0)
    assert resolve_precision("auto", cuda, [mini_model().visual, other]) == "float32"
    assert resolve_precision("bfloat16", cuda, [other]) == "bfloat16"  # freeze says why not


def test_products_are_in_tf32_on_a_gpu_alone_and_the_setting_is_put_back():
    before = torch.get_float32_matmul_precision()
    with tf32_products(torch.device("cuda")) as used:
        assert used
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with tf32_products(torch.device("cpu")) as used:
        assert not used
        assert torch.get_float32_matmul_precision() == before


def test_the_base_of_many_suspects_is_copied_back_once_to_be_hashed(gpu):
    base = mini_model().to("cuda")
    first = fingerprint(base)
    assert first == fingerprint(mini_model())
    gpu.syncs.clear()
    assert fingerprint(base) == first
    assert gpu.syncs == []
    base.visual.conv1.weight.mul_(2)
    assert fingerprint(base) != first
