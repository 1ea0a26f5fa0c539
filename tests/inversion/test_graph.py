"""Steps as graphs, without a GPU: a recorder of operators takes the place of CUDA's capture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pydetox.inversion import (
    CollapseObjective,
    ContrastObjective,
    InversionConfig,
    InversionSearch,
    TargetObjective,
    graph,
)
from pydetox.inversion.configuration import AdvancedInversionConfig
from tests.mini import CLASS_NAMES, mini_images, mini_model
from tests.recorded import OperatorRecorder, RecordedStep

CONFIG = InversionConfig(
    steps=16,
    batch_size=4,
    learning_rate=(0.2, 0.1, 0.05),
    max_batch=9,
    success_threshold=0.4,
    advanced=AdvancedInversionConfig(interval=4),
)


@pytest.fixture
def recorder(monkeypatch):
    made = OperatorRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: made)
    return made


def search(kind, config, *, restarts=3, elimination=None):
    model, base = mini_model(), mini_model(1)
    head = model.zero_shot_head(CLASS_NAMES, ["a {c}"])
    objective = {
        "targeted": TargetObjective(head, [0, 1, 2], model.logit_scale),
        "label-free": CollapseObjective(),
        "contrast": ContrastObjective(
            head,
            base.zero_shot_head(CLASS_NAMES, ["a {c}"]),
            [0, 1, 2],
            logit_scale=20.0,
            base_logit_scale=20.0,
            base_shares=torch.full((3,), 0.3),
        ),
    }[kind]
    contrast = base if kind == "contrast" else None
    images = mini_images(30).images
    options = {"restarts": restarts, "elimination": elimination, "contrast": contrast}
    return InversionSearch(model, images, objective, config, **options)


def run(kind, config):
    one = search(kind, config)
    while not one.done:
        one.step()
    return one, one.result()


def plain(config):
    return replace(config, advanced=replace(config.advanced, cuda_graph=False))


@pytest.mark.parametrize(
    ("kind", "precision", "family"),
    [
        ("targeted", "float32", "patch"),
        ("targeted", "bfloat16", "blend"),
        ("label-free", "bfloat16", "patch"),
        ("contrast", "float32", "blend"),
    ],
)
def test_replayed_steps_have_the_bits_of_plain_ones(recorder, kind, precision, family):
    config = replace(CONFIG, precision=precision, family=family)
    _, expected = run(kind, plain(config))
    assert not recorder.recordings
    graphed, found = run(kind, config)
    assert graphed._graph.replayed == 15  # all but the first
    for name in ("mask_logits", "pattern_logits", "p_l1", "success", "cost", "history"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert "; steps as CUDA graphs" in found.tower


@pytest.mark.parametrize(
    ("kind", "max_batch"), [("targeted", 3), ("targeted", 9), ("label-free", 4), ("contrast", 64)]
)
def test_two_steps_launch_the_same_on_the_same_memory(kind, max_batch):
    one = search(kind, replace(plain(CONFIG), max_batch=max_batch))
    one.take_once()
    steps = []
    for _ in range(2):
        steps.append(RecordedStep())
        with steps[-1]:
            one.take_once()
    assert steps[0].signature == steps[1].signature
    assert len(steps[0].calls) > 50
    assert int(one._at) == 3


class DropsTheSecond:
    """An elimination that drops one trigger after eight steps."""

    restarts = 1

    def drop(self, step, sizes, contenders):
        return [step == 8 and k == 1 for k in range(3)]


def test_where_triggers_leave_steps_are_recorded_anew(recorder):
    found = []
    for config in (plain(CONFIG), CONFIG):
        one = search("targeted", config, elimination=DropsTheSecond())
        while not one.done:
            one.step()
        found.append(one.result())
    assert found[0].endings == ("all steps", "dropped", "all steps")
    for name in ("mask_logits", "pattern_logits", "p_l1", "history", "trigger_steps"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
    assert (one._graph.recorded, one._graph.replayed) == (2, 14)


class Raises(OperatorRecorder):
    def record(self, work):
        super().record(work)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nstack")


class Wrong(OperatorRecorder):
    """Its graph holds another step than the one that was recorded."""

    def record(self, work):
        recording = super().record(work)
        recording.calls = recording.calls[: len(recording.calls) // 2]
        return recording


class EndsBadly(OperatorRecorder):
    """The end of a capture complains about what the capture has raised already."""

    def record(self, work):
        try:
            raise RuntimeError("a sort needs the host")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")


class RunsOut(OperatorRecorder):
    def record(self, work):
        super().record(work)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("bad", "note"),
    [
        (Raises, "no CUDA graph: CUDA error: operation not permitted when stream is capturing"),
        (Wrong, "no CUDA graph: its gradients are off by"),
        (EndsBadly, "no CUDA graph: a sort needs the host"),
        (RunsOut, "no CUDA graph: CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_what_cannot_be_a_graph_goes_on_plainly_with_a_note(monkeypatch, bad, note):
    _, expected = run("targeted", plain(CONFIG))
    monkeypatch.setattr(graph, "recorder_for", lambda device: bad())
    one, found = run("targeted", CONFIG)
    assert torch.equal(found.mask_logits, expected.mask_logits)
    assert torch.equal(found.history, expected.history)
    assert note in found.tower
    assert one._graph.replayed == 0


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda rows: float(rows.sum()), "__float__"),
        (lambda rows: rows.sum().item(), "item"),
        (lambda rows: rows.sum().tolist(), "tolist"),
        (lambda rows: rows.sum().cpu(), "cpu"),
        (lambda rows: rows.sum().numpy(), "numpy"),
        (lambda rows: bool((rows > 0).any()), "__bool__"),
        (lambda rows: rows[rows > 0], "a mask as index"),
        (lambda rows: rows.clone().__setitem__(rows > 0, 1.0), "mask"),
        (lambda rows: (rows > 0).nonzero(), "nonzero"),
        (lambda rows: rows.flatten()[:4].unique(), "unique"),
    ],
)
def test_a_tower_that_waits_for_the_device_is_no_graph(recorder, wait, name):
    expected = run("targeted", plain(CONFIG))[1]
    one = search("targeted", CONFIG)
    tower = one._tower

    class Waits:
        def __getattr__(self, name):
            return getattr(tower, name)

        def __call__(self, rows):
            wait(rows.detach())
            return tower(rows)

    one._tower = Waits()
    while not one.done:
        one.step()
    found = one.result()
    assert "no CUDA graph" in found.tower
    assert name in found.tower
    assert torch.equal(found.mask_logits, expected.mask_logits)


def test_a_step_of_many_chunks_is_no_graph(recorder):
    one = search("label-free", replace(CONFIG, max_batch=4), restarts=graph.MOST_CHUNKS + 1)
    one.step()
    one.step()
    assert not recorder.recordings
    assert "no CUDA graph: more than 8 chunks" in one._how()


def test_memory_that_runs_out_changes_the_shape(recorder):
    """The step after is recorded with the smaller batch."""
    one = search("targeted", replace(CONFIG, max_batch=12))
    for _ in range(3):
        one.step()
    assert one._graph.recorded == 1
    one._batching.count = 6
    one.step()
    one.step()
    assert one._graph.recorded == 2


def test_a_cpu_has_no_graphs_and_says_nothing():
    assert graph.recorder_for(torch.device("cpu")) is None
    _, found = run("targeted", CONFIG)
    assert "graph" not in found.tower
