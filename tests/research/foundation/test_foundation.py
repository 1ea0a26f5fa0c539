"""Models of several tasks, on tasks made here: colours and shapes that need no package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pydetox.api import unlearn
from pydetox.data import ImageSet, Splits
from pydetox.detect.configuration import ScanConfig
from pydetox.errors import UsageError
from pydetox.evaluation import Stamp
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.prototypes import image_features
from pydetox.repair.configuration import AdvancedUnlearnConfig, UnlearnConfig
from pydetox.repair.result import UnlearnRound
from pydetox.repair.retention import DriftProbe
from pydetox.research.attacks import badnets, poison
from pydetox.research.data import Task, load_task
from pydetox.research.foundation.base import FOUNDATION_CLIP, JointTraining, train_base
from pydetox.research.foundation.benchmark import (
    ELSEWHERE,
    KNOWN,
    UNKNOWN,
    other_task,
    quarter_of,
    quick_plan,
    run,
    summarize,
)
from pydetox.research.foundation.defender import only_named
from pydetox.research.foundation.evaluation import report_tasks, retrieve
from pydetox.research.foundation.victims import ATTACKS, draw_victims
from pydetox.training import TrainConfig, train_on_prompts

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230), "white": (240,) * 3}
SHAPES = ("bar", "pole", "dot")


def pictures(labels: torch.Tensor, seed: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (len(labels), 3, 32, 32), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        if kind == "colours":
            image[:, 8:24, 8:24] = torch.tensor(list(COLOURS.values())[label])[:, None, None]
        elif label == 0:
            image[:, 14:18, :] = 120
        elif label == 1:
            image[:, :, 14:18] = 120
        else:
            image[:, 12:20, 12:20] = 120
    return images


def task(kind: str, names: tuple[str, ...]) -> Task:
    def part(count: int, seed: int) -> ImageSet:
        labels = torch.arange(count) % len(names)
        return ImageSet(pictures(labels, seed, kind), labels, names, kind)

    parts = Splits(part(96, 1), part(48, 2), part(24, 3), part(24, 4))
    return Task(kind, parts, (f"a picture of {kind}: {{c}}.", "some {c} here."))


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {"colours": task("colours", tuple(COLOURS)), "shapes": task("shapes", SHAPES)}


@pytest.fixture(scope="module")
def base(tasks: dict[str, Task]) -> OpenClipModel:
    return train_base(list(tasks.values()), JointTraining(steps=40, per_task=24, seed=1))


def test_the_base_learns_all_tasks_and_follows_its_seed(
    tasks: dict[str, Task], base: OpenClipModel
) -> None:
    report = report_tasks(base, tasks, "test")
    assert min(report.accuracy().values()) > 0.9
    assert report.attacked is None
    assert report.attack_success_rate is None
    short = JointTraining(steps=2, per_task=8, seed=1)
    one, two = (train_base(list(tasks.values()), short) for _ in range(2))
    for name, weight in one.clip.state_dict().items():
        assert torch.equal(weight, two.clip.state_dict()[name])
    with pytest.raises(UsageError, match="steps 0"):
        JointTraining(steps=0)


def test_retrieval_is_that_of_a_sorted_list(tasks: dict[str, Task], base: OpenClipModel) -> None:
    sets = {name: one.splits.test for name, one in tasks.items()}
    found = retrieve(base, tasks, sets)
    captions, images, owner, start = [], [], [], 0
    for name, one in tasks.items():
        captions.append(base.zero_shot_head(one.class_names, one.templates[:1]))
        images.append(image_features(base, sets[name].images))
        labels = sets[name].labels
        assert labels is not None
        owner += (labels + start).tolist()
        start += len(one.class_names)
    scores = torch.cat(images).double() @ torch.cat(captions).double().T
    first = [scores[i].argsort(descending=True)[:5].tolist() for i in range(len(scores))]
    assert found.text_r1 == pytest.approx(
        sum(best[0] == own for best, own in zip(first, owner, strict=True)) / len(owner)
    )
    assert found.text_r5 == pytest.approx(
        sum(own in best for best, own in zip(first, owner, strict=True)) / len(owner)
    )
    ranked = [scores[:, c].argsort(descending=True)[:5].tolist() for c in range(start)]
    assert found.image_r1 == pytest.approx(
        sum(owner[best[0]] == c for c, best in enumerate(ranked)) / start
    )
    assert found.image_r5 == pytest.approx(
        sum(any(owner[i] == c for i in best) for c, best in enumerate(ranked)) / start
    )


def test_a_backdoor_is_reported_on_its_task_and_on_others(
    tasks: dict[str, Task], base: OpenClipModel
) -> None:
    everything_blue = pictures(torch.tensor([2]), 0, "colours")[0]

    def stamp(images: torch.Tensor) -> torch.Tensor:
        return everything_blue.expand_as(images).clone()

    report = report_tasks(base, tasks, "test", attacked="colours", trigger=stamp, target=2)
    assert report.attack_success_rate == 1
    assert set(report.transferred) == {"shapes"}
    assert report.transferred["shapes"][0] == 1
    assert report.kept(report) == {"colours": 1.0, "shapes": 1.0}
    assert report.to_dict()["attacked"] == "colours"


@pytest.fixture(scope="module")
def trigger() -> Stamp:
    return badnets(32, seed=3)


@pytest.fixture(scope="module")
def victim(tasks: dict[str, Task], base: OpenClipModel, trigger: Stamp) -> OpenClipModel:
    """A model whose task of colours is poisoned, and which still knows its shapes."""
    poisoned, _ = poison(tasks["colours"].splits.attacker, trigger, 1, rate=0.2, seed=0)
    training = TrainConfig(40, 3e-4, batch_size=32)
    return train_on_prompts(base, poisoned, tasks["colours"].templates, training)


def success(model: OpenClipModel, tasks: dict[str, Task], trigger: Stamp) -> float:
    found = report_tasks(model, tasks, "test", attacked="colours", trigger=trigger, target=1)
    assert found.attack_success_rate is not None
    return found.attack_success_rate


# Few images, few steps: with the default weight one shape of eight is lost.
UNLEARNING = UnlearnConfig(
    steps=50, batch_size=24, passes=1, warps=0, waves=0, attacked_images=200, retention=4.0
)


def repair(
    victim: OpenClipModel, tasks: dict[str, Task], triggers: list[Stamp] | None
) -> tuple[OpenClipModel, tuple[UnlearnRound, ...]]:
    return unlearn(
        victim,
        tasks["colours"].splits.defender,
        1,
        templates=tasks["colours"].templates,
        triggers=triggers,
        config=ScanConfig(inversion=InversionConfig(steps=40), families=("patch",)),
        unlearning=UNLEARNING,
    )


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_a_repair_removes_the_backdoor_within_the_drift_that_is_allowed(
    tasks: dict[str, Task], victim: OpenClipModel, trigger: Stamp, known: bool
) -> None:
    assert success(victim, tasks, trigger) > 0.8
    repaired, passes = repair(victim, tasks, [trigger] if known else None)
    assert success(repaired, tasks, trigger) < 0.2
    search = passes[0].search
    assert search.coefficient > 0
    assert search.drift[0] == pytest.approx(0, abs=1e-6)
    assert 0 < search.drift[search.chosen] <= UNLEARNING.max_drift
    # What was measured is what the model does now.
    probe = DriftProbe(victim, tasks["colours"].splits.defender.in_content_order().images, seed=0)
    assert probe.of(repaired).mean_distance == pytest.approx(search.drift[search.chosen], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "known",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.xfail(
                reason="not reached with recovered triggers here: see docs/foundation.md",
                strict=False,
            ),
        ),
    ],
)
def test_a_repair_holds_the_other_task(
    tasks: dict[str, Task], victim: OpenClipModel, trigger: Stamp, known: bool
) -> None:
    repaired, _ = repair(victim, tasks, [trigger] if known else None)
    after, start = (report_tasks(one, tasks, "test") for one in (repaired, victim))
    assert start.accuracy()["shapes"] > 0.9
    assert after.kept(start)["shapes"] > 0.9


def test_a_drift_that_is_not_allowed_subtracts_nothing(
    tasks: dict[str, Task], base: OpenClipModel
) -> None:
    repaired, passes = unlearn(
        base,
        tasks["colours"].splits.defender,
        1,
        templates=tasks["colours"].templates,
        triggers=[badnets(32, seed=0)],
        unlearning=UnlearnConfig(
            steps=4,
            batch_size=8,
            coefficients=(0.0, 1.0),
            max_drift=1e-9,
            min_accuracy_kept=0.0,
            advanced=AdvancedUnlearnConfig(alpha_stride=1),  # the trigger works at none of them
        ),
    )
    assert [one.search.coefficient for one in passes] == [0.0]
    assert passes[0].search.drift[1] > 1e-9
    weights = base.clip.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in repaired.clip.state_dict().items())


def test_only_named_keeps_some_classes_renumbered(tasks: dict[str, Task]) -> None:
    every = tasks["colours"].splits.test
    few = only_named(every, [3, 1])
    assert few.class_names == ("white", "green")
    assert every.labels is not None
    assert few.labels is not None
    assert len(few) == int(torch.isin(every.labels, torch.tensor([1, 3])).sum())
    green = few.images[few.labels == 1]
    assert torch.equal(green, every.images[every.labels == 1])


def test_quarters_hold_the_target() -> None:
    named = quarter_of(40, 17, seed=3)
    assert len(set(named)) == 10
    assert 17 in named
    assert named == sorted(named) == quarter_of(40, 17, seed=3)
    assert named != quarter_of(40, 17, seed=4)


def test_victims_take_turns() -> None:
    drawn = draw_victims([0, 1, 2])
    assert len(drawn) == 3 * len(ATTACKS)
    assert {v.task for v in drawn if v.attack == "badnets"} == {"fashion", "emoji", "photographs"}
    assert {v.task for v in drawn if v.attack == "wanet"} == {"fashion"}


def test_a_defender_without_images_of_the_attacked_task_has_the_next_ones() -> None:
    names = ("digits", "fashion", "emoji")
    assert [other_task(name, names) for name in names] == ["fashion", "emoji", "digits"]


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Digits stand for all tasks, which not every machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def digits(name: str, *, seed: int, image_size: int) -> Task:
        one = load_task("digits", seed=seed, image_size=image_size)
        attacker, defender = (
            part.at_most(60, seed) for part in (one.splits.attacker, one.splits.defender)
        )
        return replace(
            one, name=name, splits=replace(one.splits, attacker=attacker, defender=defender)
        )

    monkeypatch.setattr("pydetox.research.foundation.victims.load_task", digits)
    given = list[tuple[ImageSet, ScanConfig]]()

    def recorded(model: OpenClipModel, images: ImageSet, target: object, **more: Any) -> Any:
        given.append((images, more["config"]))
        return unlearn(model, images, target, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("pydetox.research.foundation.benchmark.unlearn", recorded)
    plan = replace(
        quick_plan(),
        training=JointTraining(steps=4, per_task=8),
        repair=replace(quick_plan().repair, steps=2, coefficients=(0.0, 1.0)),
        scan=ScanConfig(inversion=InversionConfig(steps=3, batch_size=8)).in_contrast(),
        methods=(KNOWN, ELSEWHERE),
        attacks=("badnets",),
        most_victims=None,
    )
    found = run(plan)
    assert [row["victim"] for row in found["victims"]] == ["badnets-emoji-seed10"]
    known, elsewhere = found["rows"]
    assert (known["attacked"], known["images"]) == ("emoji", "emoji")
    assert (elsewhere["attacked"], elsewhere["images"]) == ("emoji", "photographs")
    (named, targeted), (unnamed, free) = given
    assert (targeted.objective, free.objective) == ("targeted", "label-free")
    assert named.class_names is not None
    assert (unnamed.labels, unnamed.class_names) == (None, None)
    summary = found["summary"]
    assert summary["tasks.other_images.models"] == 1
    assert summary["tasks.other_images.asr_mean"] == elsewhere["asr"]
    monkeypatch.setattr("pydetox.research.foundation.benchmark.unlearn", None)
    again = run(plan)
    assert (again["rows"], again["summary"]) == (found["rows"], summary)


def test_figures_are_means_over_models() -> None:
    row = {
        "method": UNKNOWN,
        "attacked": "a",
        "kept": {"a": 0.98, "b": 1.0, "c": 0.9},
        "asr": 0.01,
        "transferred": {"b": 0.02, "c": 0.0},
        "retrieval_kept": 0.99,
        "seconds": 3.0,
    }
    worse = {**row, "method": "fine-tuning", "asr": 0.5, "kept": {"a": 1.0, "b": 1.0, "c": 1.0}}
    figures = summarize([row, {**row, "asr": 0.03, "kept": {"a": 1.0, "b": 1.0, "c": 1.0}}, worse])
    assert figures["tasks.attacked_ca"] == pytest.approx(0.99)
    assert figures["tasks.other_ca_mean"] == pytest.approx(0.975)
    assert figures["tasks.other_ca_min"] == 0.9
    assert figures["tasks.asr_mean"] == pytest.approx(0.02)
    assert figures["tasks.asr_transfer_max"] == 0.02
    assert figures["tasks.baselines_beaten"] == 1.0
    assert figures["methods"]["fine-tuning"]["models"] == 1


def test_the_quick_plan_reports_seeds_that_nothing_was_developed_on() -> None:
    plan = quick_plan()
    assert min(plan.seeds) >= 10
    assert replace(plan, seeds=(11,)).training == plan.training
    assert FOUNDATION_CLIP["vision_cfg"]["image_size"] == 32
