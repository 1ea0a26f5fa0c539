"""Warnings where images, class names and model do not belong together, silence where they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from open_clip.transformer import QuickGELU

from pydetox import ScanConfig, scan
from pydetox.data import DIGIT_TEMPLATES, ImageSet, load_digits
from pydetox.detect.statistics import Verdict
from pydetox.errors import PydetoxWarning
from pydetox.evaluation import predict
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.plausibility import doubts, examine, least_accuracy
from pydetox.reporting.documents import scan_document
from pydetox.research.demo import MINI_CLIP
from tests.mini import flat_calibration


@pytest.fixture(scope="module")
def model() -> OpenClipModel:
    return OpenClipModel.from_config(MINI_CLIP, seed=0, name="small")


@pytest.fixture(scope="module")
def digits(model: OpenClipModel) -> ImageSet:
    """Images that mean something to the model: their labels are what it says."""
    images = load_digits(32).sample(300, seed=1)
    head = model.zero_shot_head(images.class_names or (), DIGIT_TEMPLATES)
    return replace(images, labels=predict(model, images.images, head))


def test_nothing_is_said_of_what_belongs_together(model: OpenClipModel, digits: ImageSet) -> None:
    assert doubts(model, digits, DIGIT_TEMPLATES) == []
    model.named = "some-name"
    before = {key: value.clone() for key, value in model.clip.state_dict().items()}
    assert doubts(model, digits, DIGIT_TEMPLATES) == []
    model.named = None
    assert not any(isinstance(part, QuickGELU) for part in model.clip.modules())
    assert all(torch.equal(before[key], value) for key, value in model.clip.state_dict().items())
    assert doubts(model, replace(digits, class_names=None), DIGIT_TEMPLATES) == []


def test_class_names_that_are_no_words(model: OpenClipModel, digits: ImageSet) -> None:
    names = tuple(f"n0211436{k}" for k in range(10))
    found = doubts(model, replace(digits, class_names=names), DIGIT_TEMPLATES)
    assert "10 of 10 class names are no words ('n02114360', ...)" in found[0]
    assert "(class_names=)" in found[0] or "with class_names=" in found[0]


def test_images_that_mean_nothing(model: OpenClipModel, digits: ImageSet) -> None:
    assert digits.labels is not None
    wrong = replace(digits, labels=(digits.labels + 5) % 10)
    (line,) = doubts(model, wrong, DIGIT_TEMPLATES)
    assert "of 256 images their class" in line
    assert "chance is 10.0%, and a verdict needs 30.0%" in line
    assert "\n" not in line
    assert examine(model, wrong, DIGIT_TEMPLATES).obstacle == line
    few = wrong.sample(49, seed=0)
    assert doubts(model, few, DIGIT_TEMPLATES) == []  # too few to say it
    assert doubts(model, replace(wrong, labels=None), DIGIT_TEMPLATES) == []


def test_an_accuracy_just_above_the_level_is_a_doubt_and_no_obstacle(
    model: OpenClipModel, digits: ImageSet
) -> None:
    assert digits.labels is not None
    few = digits.sample(200, seed=2)
    assert few.labels is not None
    labels = few.labels.clone()
    labels[64:] = (labels[64:] + 3) % 10  # 32% are right, and the interval reaches below 30%
    found = examine(model, replace(few, labels=labels), DIGIT_TEMPLATES)
    assert found.obstacle is None
    (line,) = found.doubts
    assert "mean little to it" in line


def test_a_scan_of_images_that_mean_nothing_has_sizes_but_no_verdict(
    model: OpenClipModel, digits: ImageSet
) -> None:
    assert digits.labels is not None
    wrong = replace(digits.sample(60, seed=1), class_names=tuple(map(str, range(10, 20))))
    assert wrong.labels is not None
    head = model.zero_shot_head(wrong.class_names or (), DIGIT_TEMPLATES)
    answers = predict(model, wrong.images, head)
    wrong = replace(wrong, labels=(answers + 1) % 10)
    config = ScanConfig(inversion=InversionConfig(steps=2, batch_size=2))
    calibration = flat_calibration(config, wrong, MINI_CLIP, 0.5, templates=DIGIT_TEMPLATES)
    with pytest.warns(PydetoxWarning, match="a verdict needs 30.0%"):
        found = scan(
            model, wrong, calibration=calibration, templates=DIGIT_TEMPLATES, config=config
        )
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "0 of 60 images their class" in found.detection.reason
    assert found.detection.reason in found.warnings
    assert any("no words" in line for line in found.warnings)
    assert len(found.detection.p_l1) == 10
    assert scan_document(found)["warnings"] == list(found.warnings)


def test_the_level() -> None:
    assert least_accuracy(2) == 0.75
    assert least_accuracy(10) == pytest.approx(0.3)
    assert least_accuracy(1000) == pytest.approx(0.003)


def test_the_other_activation_is_said_where_answers_are_surer_with_it(
    model: OpenClipModel, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    entropies = iter([2.0, 1.5])
    monkeypatch.setattr("pydetox.plausibility._entropy", lambda *_: next(entropies))
    model.named = "ViT-B-32"
    try:
        (line,) = doubts(model, digits, DIGIT_TEMPLATES)
    finally:
        model.named = None
    assert "with QuickGELU in place of GELU" in line
    assert "entropy 1.500 instead of 2.000" in line
