"""The search against a tower whose answer is known: single pixels decide everything."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.inversion import (
    FAMILIES,
    AdvancedInversionConfig,
    CollapseObjective,
    CostSchedule,
    InversionConfig,
    RecoveredTrigger,
    TargetObjective,
    invert,
)
from pydetox.inversion.search import starting_point
from pydetox.inversion.tower import chunks
from pydetox.models.frozen import FrozenVisionTransformer
from tests.mini import mini_images, mini_model

SIZE = 8


class Pixels(torch.nn.Module):
    """Embeds an image as (red of pixel (2, 5), everything else's mean, 0.1)."""

    def forward(self, images):
        red = images[:, 0, 2, 5] * 0.25 + 0.5
        rest = (images * 0.25 + 0.5).mean(dim=(1, 2, 3))
        return torch.stack([red, rest, torch.full_like(red, 0.1)], dim=1)


class PixelModel:
    name = "pixels"
    image_size = SIZE
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    device = torch.device("cpu")
    visual = Pixels()


def images(n=20, high=100):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, high, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


class Brightness(torch.nn.Module):
    """Embeds an image as (mean of all pixels, 0.5, 0.1): only the whole image decides."""

    def forward(self, images):
        mean = (images * 0.25 + 0.5).mean(dim=(1, 2, 3))
        return torch.stack([mean, torch.full_like(mean, 0.5), torch.full_like(mean, 0.1)], dim=1)


def test_a_blend_has_one_value_for_all_pixels_and_is_as_faint_as_works():
    model = PixelModel()
    model.visual = Brightness()
    objective = TargetObjective(torch.eye(3)[:2], [0, 0], logit_scale=20.0)
    # All images have the same mean up to chance, about 0.2, which (1 - m) 0.2 + m must lift to 0.5.
    config = InversionConfig(steps=300, seed=1, family="blend")
    found = invert(model, images(), objective, config)
    assert found.family == "blend"
    for mask, pattern, size in zip(found.masks, found.patterns, found.p_l1, strict=True):
        assert float(mask.max()) == float(mask.min())
        assert float(size) == pytest.approx(float(mask[0, 0]), rel=1e-5)
        mean = float((images().float() / 255).mean())
        least = (0.5 - mean) / (float(pattern.mean()) - mean)
        assert least - 0.02 < float(mask[0, 0]) < 1.3 * least


def test_families_have_a_first_mask_of_their_own():
    firsts = {}
    for family, centre in FAMILIES.items():
        config = InversionConfig(steps=1, family=family)
        firsts[family] = starting_point(config, 2, SIZE, 20)[0]
        assert float(firsts[family].mean()) == pytest.approx(centre, abs=0.2)
        given = starting_point(
            replace(config, advanced=AdvancedInversionConfig(initial_mask=0.5)), 2, SIZE, 20
        )[0]
        assert float(given.mean()) == pytest.approx(0.5, abs=0.2)
    assert firsts["blend"].unique().numel() == 1
    assert firsts["patch"].unique().numel() > 1
    with pytest.raises(UsageError, match="family 'warp'"):
        InversionConfig(family="warp")


def test_the_pixel_that_decides_is_found_and_nothing_else():
    objective = TargetObjective(torch.eye(3)[:2], [0], logit_scale=20.0)
    found = invert(PixelModel(), images(), objective, InversionConfig(steps=300, seed=1))
    mask = found.masks[0]
    assert int(mask.argmax()) == 2 * SIZE + 5
    # Red there must exceed the mean of the image, about 0.2, wherever it was before.
    assert 0.1 < float(mask[2, 5]) < 0.5
    assert float(mask.sum()) - float(mask[2, 5]) < 0.5 * float(mask[2, 5])
    assert float(found.patterns[0, 0, 2, 5]) > 0.8
    assert float(found.p_l1[0]) == pytest.approx(float(mask.double().sum()) / SIZE**2, rel=1e-5)
    # While it searches it sees batches of 16; on all images success is a little lower.
    assert float(found.success[0]) >= 0.85
    stamped = found.trigger(0)(images()).float() / 255
    sent = stamped[:, 0, 2, 5] > stamped.mean(dim=(1, 2, 3))
    assert sent.float().mean() >= 0.85
    assert found.trigger(0).target == 0


def test_the_kept_trigger_is_the_smallest_working_one_not_the_last():
    config = InversionConfig(steps=120, seed=0)
    objective = TargetObjective(torch.eye(3)[:2], [0], logit_scale=20.0)
    sizes = [
        float(invert(PixelModel(), images(), objective, replace(config, steps=s)).p_l1[0])
        for s in (30, 60, 120)
    ]
    assert sizes[0] >= sizes[1] >= sizes[2]


def test_label_free_search_collapses_the_embeddings():
    config = InversionConfig(steps=200, success_threshold=0.99, seed=2)
    found = invert(PixelModel(), images(), CollapseObjective(), config, restarts=3)
    assert len(found) == 3
    assert found.targets is None
    assert found.trigger(0).target is None
    assert (found.success > 0.98).all()
    assert found.best() == int(np.argmin(found.p_l1.numpy()))


def test_chunks_of_triggers_change_nothing_but_memory():
    model, pictures = mini_model(), mini_images().images
    head = model.zero_shot_head(["cat", "dog", "owl"], ["a {c}"])
    objective = TargetObjective(head, [0, 1, 2], model.logit_scale)
    config = InversionConfig(steps=4, batch_size=4)
    whole = invert(model, pictures, objective, config)
    for size in (4, 3, 1):  # one trigger at a time; its images in two parts; one by one
        parts = invert(model, pictures, objective, replace(config, max_batch=size))
        torch.testing.assert_close(parts.mask_logits, whole.mask_logits, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(parts.success, whole.success)


def test_same_seed_same_bits_for_one_and_two_threads_and_the_model_is_left_alone():
    model, pictures = mini_model(), mini_images().images
    weights = {k: v.clone() for k, v in model.clip.state_dict().items()}
    config = InversionConfig(steps=5, batch_size=4, seed=9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(invert(model, pictures, CollapseObjective(), config, restarts=2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.mask_logits, results[0].mask_logits)
        assert torch.equal(other.pattern_logits, results[0].pattern_logits)
        assert torch.equal(other.p_l1, results[0].p_l1)
    different = invert(model, pictures, CollapseObjective(), replace(config, seed=8), restarts=2)
    assert not torch.equal(different.mask_logits, results[0].mask_logits)
    for key, value in model.clip.state_dict().items():
        assert torch.equal(value, weights[key])
    assert all(p.grad is None for p in model.clip.parameters())


def test_a_search_that_never_succeeds_says_so():
    objective = TargetObjective(torch.eye(3), [2], logit_scale=20.0)
    found = invert(PixelModel(), images(), objective, InversionConfig(steps=3))
    assert math.isinf(float(found.p_l1[0]))
    assert torch.isfinite(found.mask_logits).all()


def test_images_that_do_not_fit_are_refused():
    objective = CollapseObjective()
    with pytest.raises(DataError, match="at least 2"):
        invert(PixelModel(), images(1), objective)
    with pytest.raises(DataError, match="expects"):
        invert(PixelModel(), images()[..., :7], objective)
    with pytest.raises(DataError, match=r"torch\.float32"):
        invert(PixelModel(), images().float(), objective)
    with pytest.raises(UsageError, match="restarts"):
        invert(PixelModel(), images(), objective, restarts=0)


def test_embeddings_that_are_no_numbers_are_an_error():
    class Broken(Pixels):
        def forward(self, images):
            return super().forward(images) * math.nan

    model = PixelModel()
    model.visual = Broken()
    with pytest.raises(ArchitectureError, match="not finite"):
        invert(model, images(), CollapseObjective(), InversionConfig(steps=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"success_threshold": 0.0},
        {"max_batch": 0},
        {"patience": 0},
    ],
)
def test_configurations_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        InversionConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"least_progress": 1.0}, {"check_images": 0}])
def test_constants_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        AdvancedInversionConfig(**wrong)


def test_learning_rate_in_three_thirds():
    config = InversionConfig(steps=10, learning_rate=(0.5, 0.1, 0.05))
    rates = [config.rate(s) for s in range(10)]
    assert rates == [0.5] * 4 + [0.1] * 3 + [0.05] * 3
    assert InversionConfig(learning_rate=0.2).rate(7) == 0.2


def test_cost_schedule_by_hand():
    schedule = CostSchedule(initial=1.0, patience=2, up=3.0, down=5.0)
    state = schedule.start(2, torch.device("cpu"))
    history = []
    for hits in ([1, 0], [1, 0], [1, 1], [1, 0], [0, 0]):
        state = schedule.update(state, torch.tensor(hits, dtype=torch.bool))
        history.append(state.cost.tolist())
    # Trigger 0: hits at steps 1-4, raised after 2 and 4. Trigger 1: lowered after 2 and 5.
    assert [h[0] for h in history] == [1, 3, 3, 9, 9]
    np.testing.assert_allclose([h[1] for h in history], [1, 0.2, 0.2, 0.2, 0.04], rtol=1e-6)


def test_a_cost_is_balanced_when_it_falls_after_it_has_risen():
    schedule = CostSchedule(initial=1.0, patience=1)
    state = schedule.start(3, torch.device("cpu"))
    balanced = []
    for hits in ([0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]):
        state = schedule.update(state, torch.tensor(hits, dtype=torch.bool))
        balanced.append(state.balanced.tolist())
    assert [b[0] for b in balanced] == [False, False, False, True]
    assert [b[1] for b in balanced] == [False, False, True, True]
    assert [b[2] for b in balanced] == [False] * 4
    assert state.raised.tolist() == [True, True, False]


def test_amplifying_a_trigger_multiplies_its_mask_up_to_one():
    trigger = RecoveredTrigger(torch.tensor([[0.1, 0.6]]), torch.rand(3, 1, 2), target=4)
    torch.testing.assert_close(trigger.amplified(2.0).mask, torch.tensor([[0.2, 1.0]]))
    assert trigger.amplified(2.0).target == 4
    with pytest.raises(UsageError, match="amplification"):
        trigger.amplified(0.0)


@pytest.mark.parametrize("fits", [8, 2])  # two triggers at once; half of one's images
def test_a_search_goes_on_with_fewer_images_where_memory_runs_out(monkeypatch, fits):
    model, pictures = mini_model(), mini_images().images
    head = model.zero_shot_head(["cat", "dog", "owl"], ["a {c}"])
    objective = TargetObjective(head, [0, 1, 2, 0, 1], model.logit_scale)
    config = InversionConfig(steps=4, batch_size=4)
    whole = invert(model, pictures, objective, config)
    assert whole.max_batch is not None
    assert whole.max_batch > 20
    original = FrozenVisionTransformer.__call__
    refused = []

    def small(tower, inputs):
        if len(inputs) > fits and inputs.requires_grad:
            refused.append(len(inputs))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(tower, inputs)

    monkeypatch.setattr(FrozenVisionTransformer, "__call__", small)
    found = invert(model, pictures, objective, replace(config, max_batch=16))
    assert refused
    assert found.max_batch == fits
    assert "memory ran out" in found.tower
    torch.testing.assert_close(found.mask_logits, whole.mask_logits, atol=1e-3, rtol=1e-3)
    again = invert(model, pictures, objective, replace(config, max_batch=found.max_batch))
    assert torch.equal(again.mask_logits, found.mask_logits)
    assert torch.equal(again.p_l1, found.p_l1)


def test_chunks_are_few_and_equal():
    assert chunks(10, 4) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert chunks(4, 4) == [slice(0, 4)]
    assert chunks(3, 1) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert chunks(0, 4) == []
