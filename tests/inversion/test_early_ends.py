"""Searches that end before the last step: they leave the batch, and nobody else notices."""

import math
from dataclasses import replace

import pytest
import torch

from pydetox.errors import UsageError
from pydetox.inversion import (
    AdvancedInversionConfig,
    Elimination,
    InversionConfig,
    InversionSearch,
    TargetObjective,
    invert,
)
from tests.inversion.test_search import PixelModel, Pixels, images
from tests.mini import mini_images, mini_model

CONFIG = InversionConfig(
    steps=60, patience=60, seed=3, advanced=AdvancedInversionConfig(interval=5)
)


class CountingPixels(Pixels):
    """Also counts the images that go through it."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def forward(self, images):
        self.counts.append(len(images))
        return super().forward(images)


def objective(targets=(0, 1, 0, 1)):
    return TargetObjective(torch.eye(3)[:2], targets, logit_scale=20.0)


def drop(**at):
    """Drop trigger k at a step: t1=20 drops trigger 1 at step 20."""
    steps = {int(name[1:]): step for name, step in at.items()}

    def score(step, sizes):
        return [-1.0 if step >= steps.get(k, math.inf) else 0.0 for k in range(len(sizes))]

    return Elimination(score, floor=-0.5, first=1)


def test_a_dropped_trigger_is_left_as_it_was_then():
    whole = invert(PixelModel(), images(), objective(), CONFIG, elimination=drop(t1=20, t2=35))
    assert whole.endings == ("all steps", "dropped", "dropped", "all steps")
    assert whole.trigger_steps.tolist() == [60, 20, 35, 60]
    assert whole.recorded_steps == tuple(range(5, 61, 5))
    for k, steps in ((1, 20), (2, 35)):
        # The same search, ended there.
        short = invert(PixelModel(), images(), objective(), replace(CONFIG, steps=steps))
        for name in ("mask_logits", "pattern_logits", "p_l1", "cost"):
            assert torch.equal(getattr(whole, name)[k], getattr(short, name)[k]), name
        assert (whole.history[whole.recorded_steps.index(steps) :, k] == short.p_l1[k]).all()
    assert torch.equal(whole.history[-1], whole.p_l1)
    assert (whole.history[1:] <= whole.history[:-1]).all()


def test_the_others_do_not_notice():
    whole = invert(PixelModel(), images(), objective(), CONFIG)
    fewer = invert(PixelModel(), images(), objective(), CONFIG, elimination=drop(t1=20, t2=35))
    for k in (0, 3):
        assert torch.equal(fewer.mask_logits[k], whole.mask_logits[k])
        assert torch.equal(fewer.pattern_logits[k], whole.pattern_logits[k])
        assert fewer.p_l1[k] == whole.p_l1[k]
    # What was dropped would not have become larger.
    assert (whole.p_l1 <= fewer.p_l1).all()


def test_the_others_notice_no_more_than_rounding_through_matrix_products():
    model, pictures = mini_model(), mini_images().images
    head = model.zero_shot_head(["cat", "dog", "owl"], ["a {c}"])
    goal = TargetObjective(head, [0, 1, 2], model.logit_scale)
    config = InversionConfig(steps=8, batch_size=4, advanced=AdvancedInversionConfig(interval=2))
    whole = invert(model, pictures, goal, config)
    for size in (None, 4, 1):
        chunked = replace(config, max_batch=size)
        fewer = invert(model, pictures, goal, chunked, elimination=drop(t0=2, t2=4))
        assert fewer.trigger_steps.tolist() == [2, 8, 4]
        torch.testing.assert_close(fewer.mask_logits[1], whole.mask_logits[1], atol=1e-3, rtol=1e-3)


def test_a_dropped_trigger_costs_nothing():
    model = PixelModel()
    model.visual = CountingPixels()
    whole = replace(CONFIG, max_batch=4 * 16)
    search = InversionSearch(model, images(), objective(), whole, elimination=drop(t1=20, t2=35))
    model.visual.counts.clear()  # of the pass that counts the memory of an image
    while not search.done:
        search.step()
    assert model.visual.counts == [4 * 16] * 20 + [3 * 16] * 15 + [2 * 16] * 25
    assert len(search.result()) == 4


def test_a_search_ends_when_its_mask_has_stopped_shrinking():
    config = replace(
        CONFIG,
        steps=600,
        patience=25,
        advanced=replace(CONFIG.advanced, least_progress=0.05),
    )
    found = invert(PixelModel(), images(), objective(), config)
    assert set(found.endings) == {"converged"}
    assert found.steps == int(found.trigger_steps.max()) < 600
    assert found.history.shape == (120, 4)
    assert torch.equal(found.history[-1], found.p_l1)
    for k, steps in enumerate(found.trigger_steps.tolist()):
        last, before = (found.recorded_steps.index(steps - back) for back in (0, 25))
        assert found.history[last, k] >= 0.95 * found.history[before, k]
    steps = int(found.trigger_steps[1])
    short = invert(PixelModel(), images(), objective(), replace(config, steps=steps))
    assert torch.equal(short.mask_logits[1], found.mask_logits[1])
    # For 25 steps trigger 1 worked and did not shrink, because its cost did not count yet.
    sizes = found.history[:, 1]
    stalled = (sizes[5:] >= 0.95 * sizes[:-5]) & sizes[:-5].isfinite()
    assert float(sizes[:-5][stalled].max()) > 40 * found.p_l1[1]
    # It is about as small as with all steps.
    whole = invert(PixelModel(), images(), objective(), replace(config, patience=600))
    assert (found.p_l1 <= 1.15 * whole.p_l1).all()


def test_what_found_nothing_does_not_converge():
    impossible = TargetObjective(torch.eye(3), [2], logit_scale=20.0)
    found = invert(PixelModel(), images(), impossible, replace(CONFIG, steps=20, patience=5))
    assert found.endings == ("all steps",)
    assert math.isinf(float(found.p_l1[0]))


def test_same_bits_for_one_and_two_threads():
    model, pictures = mini_model(), mini_images().images
    head = model.zero_shot_head(["cat", "dog", "owl"], ["a {c}"])
    goal = TargetObjective(head, [0, 1, 2, 0], model.logit_scale)
    config = InversionConfig(steps=8, batch_size=4, advanced=AdvancedInversionConfig(interval=2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(invert(model, pictures, goal, config, elimination=drop(t1=2, t0=6)))
    finally:
        torch.set_num_threads(before)
    for name in ("mask_logits", "pattern_logits", "p_l1", "trigger_steps", "history"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


def test_wrong_use_is_refused():
    two = Elimination(lambda step, sizes: sizes, floor=0.0, restarts=2)
    with pytest.raises(UsageError, match="multiple"):
        InversionSearch(PixelModel(), images(), objective((0, 1, 0)), CONFIG, elimination=two)
    search = InversionSearch(PixelModel(), images(), objective(), CONFIG)
    search.step()
    with pytest.raises(UsageError, match="not done"):
        search.result()
