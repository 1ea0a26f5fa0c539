"""The peers of bench_scan against other code of the same schedules, and what counts as a speed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.bench_scan import is_right, summarize
from benchmarks.published import (
    DECREE_SETTINGS,
    DecreeSettings,
    _WholeDecree,
    decree,
    neural_cleanse,
)
from pydetox.compat.cleanse import CleanseRules, cleanse, outliers
from pydetox.compat.encoders import _Search
from tests.mini import CLASS_NAMES, mini_images, mini_model


def test_neural_cleanse_finds_the_masks_of_the_batched_search():
    """One batch an epoch, so that both see the same images, whatever their order is."""
    model, images = mini_model(), mini_images(20).images
    head = model.zero_shot_head(CLASS_NAMES, ("a {c}",))
    rules = CleanseRules(epochs=12, patience=2, early_stop_patience=3)
    found = neural_cleanse(model, images, head, batch_size=20, seed=3, rules=rules)
    alone = neural_cleanse(model, images, head, batch_size=20, seed=3, rules=rules, targets=[1])
    assert (alone.backdoored, alone.target) == (None, 1)

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        embeddings = model.encode_normalized((pixels - mean) / std)
        result: torch.Tensor = model.logit_scale * normalize(embeddings, dim=-1) @ head.T
        return result

    masks = cleanse(
        logits,
        lambda _: [images.float() / 255],
        torch.ones(3, 1, 16, 16),
        torch.ones(3, 3, 16, 16),
        rules,
    )
    judged = outliers([one.norm(rules) for one in masks], lower_middle=True)
    assert found.backdoored == judged.backdoored
    assert found.target is not None
    assert found.p_l1 == pytest.approx(judged.norms[found.target] / 256, rel=1e-3)
    assert found.anomaly_index == pytest.approx(judged.anomaly_index, rel=1e-2)
    assert found.steps == sum(one.epochs for one in masks)
    assert found.passes == 2 * 20 * found.steps


def test_decree_weighs_its_mask_as_the_replacement_of_its_main_does():
    settings = DECREE_SETTINGS["cifar10"]
    model = mini_model()
    whole = _WholeDecree(model, settings, 0)
    other = _Search.__new__(_Search)  # its schedule alone
    other._norm = torch.tensor([math.inf], dtype=torch.float64)
    other._cost, other._before, other.least_cost = 1e-3, math.inf, settings.least_cost
    other._hits = other._misses = other._at_least = other._still = 0
    outcomes = [*[True] * 80, *[False] * 200, *[True] * 40]
    outcomes += torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    size = 100.0
    for step, outcome in enumerate(outcomes):
        size *= 0.99 if step % 7 else 1.1
        whole._adapt(bool(outcome), size)
        if outcome:
            other._norm = other._norm.clamp(max=size)
        other._adapt(bool(outcome))
        assert whole._cost == pytest.approx(3 * other._cost)
        assert whole.still == other._still
    assert whole.smallest == float(other._norm)


def test_decree_ends_at_its_last_epoch_or_when_it_no_longer_gets_on():
    model, images = mini_model(), mini_images(10).images
    short = DecreeSettings(
        batch_size=4, rate_changes=(1, 2), least_cost=1e-5, patience=10, epochs=3
    )
    found = decree(model, images, short, seed=0)
    assert (found.steps, found.passes) == (9, 60)
    assert found == decree(mini_model(), images, short, seed=0)
    # The embeddings of a model that was never trained are alike with any trigger.
    settings = DecreeSettings(4, (30, 50), 1e-5, 10, epochs=400)
    assert decree(mini_model(), images, settings, seed=0).steps < 1200


def row(method: str, true: int | None, seconds: float, **other: Any) -> dict[str, Any]:
    return {
        "classes": 10,
        "method": method,
        "true_target": true,
        "backdoored": true is not None,
        "target": true,
        "seconds": seconds,
        "peak_mib": 50.0,
        **other,
    }


def test_speeds_are_those_of_right_verdicts_with_shared_references():
    rows = []
    for target in (None, 3):
        rows += [
            row("pydetox", target, 30.0, references_seconds=20.0),
            row("pydetox quick", target, 6.0, references_seconds=5.0, peak_mib=25.0),
            # Wrong about the clean model, and faster than the one that is right.
            row("DECREE (CLIP)", target, 10.0, backdoored=True, target=None),
            row("DECREE (CIFAR-10)", target, 100.0, target=None),
            # The right verdict, and another class.
            row("Neural Cleanse (32)", target, 90.0, target=None if target is None else 4),
            row("Neural Cleanse (256)", target, 80.0, backdoored=False),
        ]
    for one in rows:
        one["right"] = is_right(one)
    found = summarize(rows)
    assert found["scan10.vs_decree"] == pytest.approx(100 / 30)
    assert found["scan10.vs_decree_10"] == pytest.approx(100 / 12)
    assert found["scan10.vs_decree_100"] == pytest.approx(100 / 10.2)
    assert found["scan10_quick.vs_decree"] == pytest.approx(100 / 6)
    assert found["scan10_quick.memory_vs_decree"] == pytest.approx(0.5)
    assert found["scan10.decree_seconds"] == 10.0
    assert found["scan10.neural_cleanse_right"] == 0.5
    assert not any("vs_neural_cleanse" in key for key in found)


def test_a_sample_of_classes_gives_a_time_and_no_verdict():
    rows = []
    for target in (None, 3):
        rows += [
            row("pydetox", target, 30.0, references_seconds=20.0),
            row("pydetox quick", target, 6.0, references_seconds=5.0),
            row("DECREE (CLIP)", target, 100.0, target=None),
            row("Neural Cleanse (32)", target, 90.0, backdoored=None, extrapolated=300.0),
        ]
    for one in rows:
        one["right"] = is_right(one)
    found = summarize(rows)
    assert found["scan10.vs_neural_cleanse_extrapolated"] == pytest.approx(10)
    assert "scan10.vs_neural_cleanse" not in found


def test_no_verdict_is_not_right():
    assert not is_right(row("pydetox", None, 1.0, backdoored=None))
    assert not is_right(row("pydetox", 3, 1.0, backdoored=None))
