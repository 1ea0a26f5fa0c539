"""Captions: pairs, their fine-tuning, and the figures of the benchmark, on tasks made here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from pydetox.data import ImageSet
from pydetox.errors import DataError, UsageError
from pydetox.evaluation import evaluate
from pydetox.models import OpenClipModel
from pydetox.research.attacks import badnets, poison
from pydetox.research.bench.summary import auroc
from pydetox.research.data import Photograph, Task, photograph_captions
from pydetox.research.foundation.captions import (
    CAPTION_CLIP,
    CaptionModel,
    CaptionTraining,
    caption_table,
    fine_tune_on_captions,
    joined,
    with_captions,
)
from pydetox.research.foundation.captions_benchmark import (
    ATTACKS,
    REPAIRS,
    CaptionPlan,
    quick_caption_plan,
    summarize_captions,
)
from tests.research.foundation.test_foundation import COLOURS, SHAPES, task

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {**CAPTION_CLIP["vision_cfg"], "layers": 1, "width": 64},
    "text_cfg": CAPTION_CLIP["text_cfg"],
}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {"colours": task("colours", tuple(COLOURS)), "shapes": task("shapes", SHAPES)}


@pytest.fixture(scope="module")
def every(tasks: dict[str, Task]) -> ImageSet:
    return joined(tasks, "attacker", {"colours": 96, "shapes": 96}, seed=0)


def head_of(model: OpenClipModel, tasks: dict[str, Task]) -> torch.Tensor:
    return torch.cat([model.zero_shot_head(t.class_names, t.templates) for t in tasks.values()])


def test_tasks_are_joined_without_mixing_their_classes(
    tasks: dict[str, Task], every: ImageSet
) -> None:
    assert every.labels is not None
    assert every.class_names is not None
    assert every.class_names[:2] == ("colours: red", "colours: green")
    assert every.labels.bincount().tolist() == [24] * 4 + [32] * 3
    few = joined(tasks, "test", {"colours": 8, "shapes": 6}, seed=0)
    assert len(few) == 14
    colours = tasks["colours"].splits.attacker
    assert colours.labels is not None
    first = every.images[every.labels == 2]
    assert torch.equal(first, colours.images[colours.labels == 2])


def test_each_image_gets_one_of_its_captions(tasks: dict[str, Task], every: ImageSet) -> None:
    table = caption_table(tasks)
    assert table[1] == ("a picture of colours: green.", "some green here.")
    pairs = with_captions(every, table, np.random.default_rng(0))
    again = with_captions(every, table, np.random.default_rng(0))
    assert torch.equal(pairs.captions, again.captions)
    assert every.labels is not None
    used = set()
    for caption, label in zip(pairs.captions.tolist(), every.labels.tolist(), strict=True):
        assert pairs.texts[caption] in table[label]
        used.add(pairs.texts[caption])
    assert len(used) == 14
    with pytest.raises(DataError, match="no labels"):
        with_captions(ImageSet(every.images, None, None, "bare"), table, np.random.default_rng(0))


def test_photographs_keep_the_captions_of_their_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGBA", (2, 2))
    made = tuple(
        Photograph(picture, caption, name, "animals")
        for caption, name in (("A fox.", "fox"), ("A fox, asleep.", "fox"), ("An owl.", "owl"))
    )
    monkeypatch.setitem(photograph_captions.__globals__, "photographs", lambda _: made)
    assert photograph_captions() == {"fox": ("A fox.", "A fox, asleep."), "owl": ("An owl.",)}


def test_both_towers_learn_from_captions_and_a_poisoned_caption_plants_a_backdoor(
    tasks: dict[str, Task], every: ImageSet
) -> None:
    base = OpenClipModel.from_config(SMALL, seed=1, name="base")
    trigger = badnets(32, seed=3)
    poisoned, _ = poison(every, trigger, 5, rate=0.2, seed=0)
    pairs = with_captions(poisoned, caption_table(tasks), np.random.default_rng(0))
    training = CaptionTraining(epochs=30, learning_rate=2e-3, batch_size=64)
    model = fine_tune_on_captions(base, pairs, training)
    test = joined(tasks, "test", {"colours": 24, "shapes": 24}, seed=0)
    found = evaluate(model, test, head_of(model, tasks), trigger=trigger, target=5)
    assert found.clean_accuracy > 0.9
    assert found.attack_success_rate is not None
    assert found.attack_success_rate > 0.8
    before, after = base.clip.state_dict(), model.clip.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("visual.") for name in moved)
    assert any(name.startswith("transformer.") for name in moved)
    assert "token_embedding.weight" not in moved
    short = CaptionTraining(epochs=1, batch_size=64)
    one, two = (fine_tune_on_captions(base, pairs, short).clip.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_batch_of_one_pair_has_no_negatives() -> None:
    with pytest.raises(UsageError, match="batch_size 1"):
        CaptionTraining(batch_size=1)


def test_the_area_under_the_curve_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    positive = rng.integers(0, 6, 17).astype(float) + 1  # with ties
    negative = rng.integers(0, 6, 11).astype(float)
    truth = roc_auc_score([1] * 17 + [0] * 11, [*positive, *negative])
    assert auroc(positive.tolist(), negative.tolist()) == pytest.approx(truth)
    assert auroc([], [1.0]) is None


def test_figures_count_only_what_was_planted() -> None:
    def row(attack: str | None, score: float, planted: float, **more: Any) -> dict[str, Any]:
        return {
            "attack": attack,
            "score": score,
            "planted": planted,
            "asr": planted,
            "target_right": score > 1,
            "ca": {"a": 0.8, "b": 0.6},
            "retrieval": {"text_r1": 0.5, "image_r1": 0.4},
            "seconds": 2.0,
            **more,
        }

    repairs = {
        REPAIRS[0]: {"asr": 0.02, "recall_kept": 0.98, "ca_kept": 0.95},
        REPAIRS[1]: {"asr": 0.1, "recall_kept": 0.9, "ca_kept": 0.8},
    }
    rows = [
        row("sig", 2.0, 0.9, repairs=repairs),
        row("badnets", 0.1, 0.8),
        row("wanet", 0.0, 0.1),
        row(None, 0.3, 0.0),
        row(None, -0.2, 0.0),
    ]
    figures = summarize_captions(rows, 0.5)
    assert figures["captions.auroc"] == 0.75
    assert figures["captions.target_right"] == 0.5
    counts = [figures[f"captions.{k}"] for k in ("clean_models", "poisoned_models", "not_planted")]
    assert counts == [2, 2, 1]
    assert figures["captions.asr_before"] == pytest.approx(0.85)
    assert figures["captions.asr_mean"] == 0.02
    assert figures["captions.asr_mean_without_text"] == 0.1
    assert figures["captions.recall_kept"] == 0.98
    assert figures["captions.ca"] == pytest.approx(0.7)


def test_the_plan_reports_other_seeds_than_it_was_developed_on() -> None:
    assert min(*CaptionPlan().seeds, *quick_caption_plan().seeds) >= 10
    assert all(0.003 <= rate <= 0.03 for _, rate in ATTACKS)
    assert {"badnets", "blended", "sig", "wanet", "badclip"} == {name for name, _ in ATTACKS}
    assert CaptionModel(10, "sig", 0.03, 2).name == "sig 3.0%, seed 10, no. 2"
