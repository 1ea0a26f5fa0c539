"""What takes some of the images takes a seeded sample of all classes, whatever their order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pydetox
from pydetox import ScanConfig, calibrate, detox
from pydetox.data import ImageSet
from pydetox.detect.statistics import Verdict
from pydetox.evaluation import evaluate
from pydetox.inversion import AdvancedInversionConfig, InversionConfig, TargetObjective, invert
from pydetox.models import OpenClipModel
from pydetox.repair.alpha import search_coefficient
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.trigger_vector import trigger_vector
from pydetox.research.attacks import PatchTrigger, poison
from pydetox.training import TrainConfig, train_on_prompts
from tests.mini import CLASS_NAMES, mini_model
from tests.test_training import TEMPLATES, coloured

ROOT = Path(pydetox.__file__).parent
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TARGET = 0
TRIGGER = PatchTrigger(torch.full((3, 4, 4), 255, dtype=torch.uint8), 2, 2)


def by_class(images: ImageSet) -> ImageSet:
    """The set as a folder gives it: one class after the other."""
    assert images.labels is not None
    return images.subset(images.labels.argsort(stable=True))


def shuffled(images: ImageSet) -> ImageSet:
    return images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(5)))


@pytest.fixture(scope="module")
def world() -> tuple[OpenClipModel, OpenClipModel, ImageSet]:
    """A base, a backdoored fine-tune of it, and images."""
    data = coloured(180)
    base = train_on_prompts(
        mini_model(), data, TEMPLATES, TrainConfig(epochs=15, learning_rate=3e-3, train_text=True)
    )
    poisoned, _ = poison(data, TRIGGER, TARGET, rate=0.25, seed=0)
    victim = train_on_prompts(base, poisoned, TEMPLATES, TrainConfig(epochs=30, learning_rate=3e-3))
    head = victim.zero_shot_head(CLASS_NAMES, TEMPLATES)
    planted = evaluate(victim, data, head, trigger=TRIGGER, target=TARGET)
    assert planted.attack_success_rate is not None
    assert planted.attack_success_rate > 0.9
    return base, victim, data


def test_alpha_is_chosen_on_images_of_all_classes(
    world: tuple[OpenClipModel, OpenClipModel, ImageSet],
) -> None:
    """With more than 20 triggers each is tried on a part of the images: not on the first class."""
    _, victim, data = world
    head = victim.zero_shot_head(CLASS_NAMES, TEMPLATES)

    def spares_the_first_class(images: Tensor) -> Tensor:
        own = images.double().mean(dim=(2, 3)).argmax(dim=1)  # their colour
        return torch.where((own == 1)[:, None, None, None], images, TRIGGER(images))

    config = UnlearnConfig(steps=40, learning_rate=1e-3, min_accuracy_kept=0.5)
    triggers = [spares_the_first_class] * 21
    vector = trigger_vector(victim, data.images, triggers, head, TARGET, config)
    found = [
        search_coefficient(victim, vector, order, triggers, head, TARGET, config)
        for order in (by_class(data), shuffled(data))
    ]
    for one in found:
        assert one.attack_success_rate[0] == pytest.approx(0.5, abs=0.1)
        assert one.coefficient > 0
    assert found[0].coefficient == pytest.approx(found[1].coefficient, abs=0.1001)


def test_the_check_of_a_search_is_of_images_of_all_classes(
    world: tuple[OpenClipModel, OpenClipModel, ImageSet],
) -> None:
    """A search of one step: its trigger does nothing, so only the target's own images have it."""
    _, victim, data = world
    data = by_class(data)
    head = victim.zero_shot_head(CLASS_NAMES, TEMPLATES)
    objective = TargetObjective(head, [0, 1, 2], victim.logit_scale)
    config = InversionConfig(
        steps=1, advanced=AdvancedInversionConfig(check_images=30, initial_mask=-20.0)
    )
    found = invert(victim, data.images, objective, config, labels=data.labels)
    assert found.success.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


@pytest.fixture(scope="module")
def repairs(world: tuple[OpenClipModel, OpenClipModel, ImageSet]) -> list[pydetox.DetoxResult]:
    """The whole workflow on a sorted and on a shuffled copy of one image set."""
    base, victim, data = world
    config = ScanConfig(
        inversion=InversionConfig(steps=60, batch_size=8),
        reference_training=TrainConfig(epochs=3, learning_rate=1e-3),
        references=2,
        p_backdoored=0.2,
        p_suspicious=0.3,
    )
    unlearning = UnlearnConfig(steps=40, learning_rate=1e-3, min_accuracy_kept=0.8, passes=1)
    given = {"templates": TEMPLATES, "config": config}
    return [
        detox(
            victim,
            order,
            calibration=calibrate(base, order, **given),
            unlearning=unlearning,
            max_rounds=1,
            **given,
        )
        for order in (by_class(data), shuffled(data))
    ]


def test_the_order_of_the_images_changes_no_verdict_and_no_alpha(
    repairs: list[pydetox.DetoxResult],
) -> None:
    first, second = repairs
    assert first.verdict is second.verdict is Verdict.BACKDOORED
    assert first.before.target == second.before.target == TARGET
    assert first.after is not None
    assert second.after is not None
    assert first.after.verdict is second.after.verdict
    assert len(first.rounds) == len(second.rounds) > 0
    for one, other in zip(first.rounds, second.rounds, strict=True):
        assert one.search.coefficient == pytest.approx(other.search.coefficient, abs=0.1001)
    # More than that: all numbers are the same.
    assert first.before.detection == second.before.detection
    assert [r.search for r in first.rounds] == [r.search for r in second.rounds]


def test_the_digest_of_a_set_is_of_its_images_alone() -> None:
    data = coloured(9)
    assert data.digest == by_class(data).digest == replace(data, labels=None).digest
    assert data.digest != data.subset(range(8)).digest
    assert data.digest != data.subset([0, 0, *range(2, 9)]).digest
    ordered = by_class(data).in_content_order()
    assert torch.equal(ordered.images, shuffled(data).in_content_order().images)
    assert ordered.in_content_order() is ordered
    # Equal images of several labels are ordered, too.
    twins = ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 0]), ("a", "b"))
    assert twins.labels is not None
    ordered = twins.in_content_order()
    assert ordered.labels is not None
    assert ordered.labels.tolist() == [0, 1]


def beginnings(tree: ast.AST) -> Iterator[ast.AST]:
    """Expressions that take images from the beginning: images[:n], images[0], subset(range(n))."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and re.search(
            r"(images|pixels)(\[.*\])?$", ast.unparse(node.value)
        ):
            index = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
            slices = (
                isinstance(index, ast.Slice) and index.lower is None and index.upper is not None
            )
            if slices or (isinstance(index, ast.Constant) and isinstance(index.value, int)):
                yield node
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("subset")
            and "range(" in ast.unparse(node)
        ):
            yield node


def test_no_image_set_is_sliced_from_its_beginning() -> None:
    found = [
        f"{path.relative_to(ROOT.parent)}:{node.lineno}: {ast.unparse(node)}"
        for path in [*sorted(ROOT.rglob("*.py")), *sorted(BENCHMARKS.rglob("*.py"))]
        for node in beginnings(ast.parse(path.read_text()))
    ]
    assert found == []
    example = "a.images[:3], b.images[0], images[:n, 0], s.subset(range(5)), images[i : i + 2]"
    assert len(list(beginnings(ast.parse(example)))) == 4
    assert len(list(beginnings(ast.parse("pixels[labels != 1][:n]")))) == 1
