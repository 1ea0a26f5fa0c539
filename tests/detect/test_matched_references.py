"""References that moved as far as their suspects: one plan for the library, in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pydetox import calibrate, scan
from pydetox.detect.calibration_file import read_calibration, write_calibration
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.references import ReferencePlan
from pydetox.detect.statistics import Calibration, Verdict
from pydetox.errors import DataError, PydetoxWarning, UsageError
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.training import TrainConfig
from tests.mini import mini_images, mini_model

CONFIG = ScanConfig(
    inversion=InversionConfig(steps=3, batch_size=4), families=("patch",), references=2
)


def moved(base: OpenClipModel, share: float, seed: int = 0) -> OpenClipModel:
    """Return a model whose image tower lies that far from the base's."""
    model, generator = base.clone(), torch.Generator().manual_seed(seed)
    for value in model.visual.parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(value + share * value.norm() * noise / noise.norm())
    model.name = f"moved by {share:g}"
    return model


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydetox.detect.copies.STEPS", 8)
    monkeypatch.setattr("pydetox.detect.copies.LEAST_ACCURACY", 0.0)


def test_a_calibration_serves_all_that_moved_about_as_far(tmp_path: Path) -> None:
    base, images = mini_model(), mini_images()
    suspects = [moved(base, 0.06), moved(base, 0.065, 1), moved(base, 0.3)]
    with pytest.warns(PydetoxWarning, match=r"moved by 2: the weights lie 2\d\d%"):
        made = calibrate(base, images, suspects=[*suspects, moved(base, 2)], config=CONFIG)
    assert [one.distance for one in (made, *made.rungs)] == [2.0**-4, 2.0**-2]
    assert made.models == ("mini, fine-tuned 1", "mini, fine-tuned 2")
    path = tmp_path / "calibration.json"
    write_calibration(path, made)
    assert read_calibration(path) == made
    # It gives what the base alone gives.
    for suspect in (suspects[1], suspects[2]):
        stored = scan(suspect, images, base=base, calibration=made, config=CONFIG)
        alone = scan(suspect, images, base=base, config=CONFIG)
        assert stored.calibration == alone.calibration
        assert stored.detection == alone.detection
    other = scan(moved(base, 0.01), images, base=base, calibration=made, config=CONFIG)
    assert other.verdict is Verdict.INCONCLUSIVE
    if math.isfinite(min(other.detection.p_l1)):
        assert "no references that moved as far as this model (0.01" in other.detection.reason
    with pytest.raises(UsageError, match="give that base="):
        scan(suspects[0], images, calibration=made, config=CONFIG)
    # Sizes of one distance are not compared with those of another.
    (key,) = {one.key for one in (made,)}
    assert key not in {one.key for one in made.rungs}


def test_what_cannot_be_matched_is_said() -> None:
    base, images = mini_model(), mini_images()
    with pytest.raises(UsageError, match="none are given: give suspects="):
        calibrate(base, images, config=CONFIG)
    with pytest.raises(DataError, match="too far for copies of it to be comparable: give the base"):
        calibrate(base, images, suspects=[mini_model(1)], config=CONFIG)
    found = scan(mini_model(1), images, base=base, config=CONFIG)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.calibration is None


def test_the_plan_decides_whether_distances_count() -> None:
    rows = ((0.2, 0.3, 0.25), (0.21, 0.28, 0.26))
    plain = Calibration(p_l1=rows, key="{}", models=("one", "two"))
    matched = replace(plain, distance=0.25)
    told = ScanConfig(reference_training=TrainConfig(1, 1e-5))
    assert not ReferencePlan.decide(told, base="b").by_distance
    assert ReferencePlan.decide(base="b").by_distance
    assert ReferencePlan.decide(base="b", calibration=matched).by_distance
    assert ReferencePlan.decide(base="b", calibration=matched).base == "b"
    assert not ReferencePlan.decide(base="b", calibration=plain).by_distance
    assert not ReferencePlan.decide(base="b", references=["r", "s"]).by_distance
    assert matched.with_rungs([replace(plain, distance=0.5)]).at_distance(0.5) is not None
    assert matched.at_distance(0.125) is None
