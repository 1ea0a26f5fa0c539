"""Scans of many classes: a short search of all of them decides, few are searched to the end."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pydetox import calibrate, scan
from pydetox.data import ImageSet
from pydetox.detect.calibration_file import read_calibration, write_calibration
from pydetox.detect.configuration import AdvancedScanConfig, ScanConfig
from pydetox.detect.screening import (
    chosen_classes,
    merged,
    screen_classes,
    screened_detection,
    screening_search,
    screens,
)
from pydetox.detect.statistics import Calibration, Verdict, detect
from pydetox.errors import UsageError
from pydetox.inversion import InversionConfig, TargetObjective, invert
from pydetox.inversion.search import InversionSearch
from pydetox.reporting.documents import scan_document
from pydetox.session import Session
from tests.mini import mini_images, mini_model

NAMES = tuple(f"thing {k}" for k in range(24))
CONFIG = ScanConfig(inversion=InversionConfig(steps=20, batch_size=8, precision="float32"))


def pictures(count: int = 32) -> ImageSet:
    return ImageSet(mini_images(count).images, None, NAMES, "many")


def one(base, seed):
    """A model whose image tower differs a little from another one."""
    model = base.clone()
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.visual.parameters():
        parameter.data += (
            0.05 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=rng)
        )
    model.name = f"model {seed}"
    return model


@pytest.fixture(scope="module")
def scanned():
    base = mini_model()
    references = [one(base, seed) for seed in (1, 2, 3)]
    calibration = calibrate(None, pictures(), references=references, config=CONFIG)
    return base, calibration, scan(one(base, 4), pictures(), calibration=calibration, config=CONFIG)


def test_many_classes_are_screened_and_few_are_searched(scanned):
    _, calibration, found = scanned
    assert calibration.screened
    assert all(family.screened for family in calibration.others)
    advanced = CONFIG.advanced
    for result in (found, *found.others):
        detection, inversion = result.detection, result.inversion
        searched = [c for c in range(24) if detection.dropped[c] is None]
        assert len(searched) == advanced.searched_classes
        assert len(detection.effort) == len(detection.class_scores or detection.effort) == 24
        assert inversion.targets == tuple(range(24))
        steps = inversion.trigger_steps.tolist()
        gone = [steps[c] for c in range(24) if c not in searched]
        short = advanced.screening_steps // (1 if result.family == "patch" else 2)
        assert gone == [short] * len(gone)
        assert all(inversion.endings[c] != "dropped" for c in searched)
        assert detection.target is None or detection.target in searched
        assert inversion.history.shape == (len(inversion.recorded_steps), 24)
        assert torch.equal(inversion.history[-1], inversion.p_l1)
        assert result.calibration is not None
    document = scan_document(found)
    assert document["tower_passes"] == found.tower_passes
    assert len(document["class_effort"]) == 24
    assert document["reference_p_l1"] == []


def test_the_passes_through_the_tower_are_counted_exactly(scanned):
    base, _, found = scanned
    advanced = CONFIG.advanced
    short = screening_search(CONFIG, found.family)
    screening = 24 * short.batch_size * (2 * short.steps + 1)
    steps = found.inversion.trigger_steps.tolist()
    full = sum(n for n, step in zip(steps, found.detection.dropped, strict=True) if step is None)
    passes = screening + 2 * 8 * full + advanced.searched_classes * 32
    assert found.inversion.tower_passes == passes
    # By counting what goes through a tower, also where memory is short.
    model = base.clone()
    head = model.zero_shot_head(NAMES, ["a {c}"])
    goal = TargetObjective(head, [0, 1, 2], model.logit_scale)
    for most, forward in ((None, 3 * 4), (2, 2 * 3 * 4)):
        config = InversionConfig(steps=5, batch_size=4, max_batch=most)
        counted = invert(model, pictures().images, goal, config)
        assert counted.tower_passes == 5 * (forward + 3 * 4) + 3 * 32


def test_a_contrast_counts_both_towers(scanned):
    base, _, _ = scanned
    config = replace(CONFIG, contrast=True, families=("patch",))
    session = Session.open(one(base, 5), pictures(), base=base)
    alone = screen_classes(
        Session.open(one(base, 5), pictures()),
        replace(config, contrast=False),
        "patch",
        description="",
    )
    both = screen_classes(session, config, "patch", description="")
    assert both.inversion.tower_passes == 2 * alone.inversion.tower_passes


def test_all_triggers_of_a_screening_start_alike_and_its_effort_is_the_mean_loss(scanned):
    base, _, _ = scanned
    session = Session.open(base, pictures())
    short = screening_search(CONFIG, "patch")
    objective = TargetObjective(session.head, range(24), base.logit_scale)
    search = InversionSearch(base, session.images.images, objective, short)
    assert bool((search._triggers.mask == search._triggers.mask[:1]).all())
    losses = []
    while not search.done:
        search.step()
        losses.append(search.loss.double().numpy())
    expected = np.mean(losses[short.steps // 3 :], axis=0)
    found = screen_classes(session, CONFIG, "patch", description="")
    np.testing.assert_allclose(found.effort, expected, rtol=1e-12)


@pytest.mark.parametrize(("limit", "screened"), [(None, False), (24, False), (23, True)])
def test_the_number_of_classes_decides(limit, screened):
    config = replace(CONFIG, advanced=AdvancedScanConfig(screen_above=limit))
    session = Session.open(mini_model(), pictures())
    assert screens(config, session) is screened
    assert not screens(ScanConfig("label-free"), session)


def test_a_calibration_of_complete_searches_does_not_fit_a_screened_scan(scanned):
    base, calibration, _ = scanned
    every = replace(CONFIG, advanced=AdvancedScanConfig(screen_above=None))
    with pytest.raises(UsageError, match="does not fit this scan"):
        scan(base, pictures(), calibration=calibration, config=every)


def test_a_calibration_of_a_screening_is_written_and_read(scanned, tmp_path):
    _, calibration, _ = scanned
    write_calibration(tmp_path / "c.json", calibration)
    assert read_calibration(tmp_path / "c.json") == calibration


def test_the_classes_that_stand_out_are_chosen():
    effort = (3.0, 1.0, 2.0, 0.5)
    assert chosen_classes(effort, (), 2) == (3, 1)
    assert chosen_classes(effort, (5.0, 0.0, 7.0, math.nan), 2) == (2, 0)
    assert chosen_classes(effort, (5.0, 0.0, 7.0, 1.0), 3, cleared=[2]) == (0, 3, 1)
    assert chosen_classes(effort, (), 9) == (3, 1, 2, 0)


def judged(sizes_of_chosen):
    """The verdict on 30 classes of which class 4 stands out, and that was searched."""
    rng = np.random.default_rng(0)
    logs = 1 + 0.1 * rng.standard_normal((5, 30))
    calibration = Calibration(
        tuple(map(tuple, np.exp(logs[:4]).tolist())), "k", tuple("abcd"), screened=True
    )
    logs[4, 4] -= 2
    effort = np.exp(logs[4]).tolist()
    first = detect(effort, calibration, has_classes=True)
    base = mini_model()
    head = base.zero_shot_head(NAMES, ["a {c}"])
    objective = TargetObjective(torch.cat([head, head[:6]]), range(30), base.logit_scale)
    images = pictures().images
    short = invert(base, images, objective, InversionConfig(steps=2, batch_size=2))
    few = TargetObjective(torch.cat([head, head[:6]]), [4], base.logit_scale)
    full = replace(
        invert(base, images, few, InversionConfig(steps=3, batch_size=2)),
        p_l1=torch.tensor(sizes_of_chosen, dtype=torch.float64),
    )
    found = merged(short, full, (4,), 1)
    sizes = [math.inf] * 30
    sizes[4] = sizes_of_chosen[0]
    again = [math.inf if c == 4 and sizes[4] == math.inf else v for c, v in enumerate(effort)]
    confirmed = detect(again, calibration, has_classes=True)
    return screened_detection(first, confirmed, effort, sizes, (4,), found)


def test_a_class_that_stands_out_and_has_a_trigger_is_a_finding():
    found = judged([0.03])
    assert found.verdict is Verdict.BACKDOORED
    assert (found.target, found.suspects, found.backdoored) == (4, (4,), (4,))
    assert found.dropped[4] is None
    assert found.smallest_p_l1 == 0.03
    assert "1 classes were searched" in found.reason


def test_without_a_trigger_it_is_inconclusive():
    found = judged([math.inf])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.suspects == ()
    assert "no working trigger" in found.reason
    assert judged([1e-6]).verdict is Verdict.INCONCLUSIVE


def clean_p_values(classes, trials, *, screened, wider, seed=7):
    """p-values of clean models whose efforts scatter `wider` times as much as the references'."""
    rng = np.random.default_rng(seed)
    deviations, found = 0.02 * np.geomspace(0.5, 2, classes), []
    for _ in range(trials):
        logs = deviations * rng.standard_normal((4, classes))
        logs[3] *= wider
        logs += 2 + 0.2 * rng.standard_normal((4, 1)) + 0.3 * np.sin(np.arange(classes))
        rows = tuple(map(tuple, np.exp(logs[:3]).tolist()))
        calibration = Calibration(rows, "k", tuple("abc"), screened=screened)
        found.append(detect(np.exp(logs[3]).tolist(), calibration, has_classes=True))
    return found


@pytest.mark.parametrize(("classes", "trials"), [(24, 200), (100, 150), (1000, 30)])
@pytest.mark.parametrize("wider", [1.0, 2.0])
def test_clean_models_of_many_classes_raise_no_more_alarms_than_stated(classes, trials, wider):
    found = clean_p_values(classes, trials, screened=True, wider=wider)
    alarms = sum(one.p_value < 0.05 for one in found)
    assert alarms <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)


def test_models_that_scatter_more_than_the_references_would_raise_alarms_otherwise():
    plain = clean_p_values(100, 60, screened=False, wider=8.0)
    assert sum(one.p_value < 0.05 for one in plain) > 20
    screened = clean_p_values(100, 60, screened=True, wider=8.0)
    assert sum(one.p_value < 0.05 for one in screened) <= 8


def test_a_complete_search_can_only_take_a_finding_back():
    rng = np.random.default_rng(3)
    logs = 2 + 0.02 * rng.standard_normal((4, 60))
    logs[3, [5, 9]] -= 0.5
    calibration = Calibration(
        tuple(map(tuple, np.exp(logs[:3]).tolist())), "k", tuple("abc"), screened=True
    )
    effort = np.exp(logs[3]).tolist()
    first = detect(effort, calibration, has_classes=True)
    assert first.suspects == (5, 9)
    chosen = chosen_classes(effort, first.class_scores, 3)
    assert set(first.suspects) <= set(chosen)
    fewer = detect(
        [math.inf if c == 5 else v for c, v in enumerate(effort)], calibration, has_classes=True
    )
    assert fewer.suspects == (9,)
