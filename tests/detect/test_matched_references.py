"""References that moved as far as their suspects: one plan for the library, in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from pydetox import calibrate, scan
from pydetox.detect.calibration_file import read_calibration, write_calibration
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.copies import OutOfReachError
from pydetox.detect.interpolation import around
from pydetox.detect.references import ReferencePlan
from pydetox.detect.statistics import Calibration, Verdict, detect
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
    suspects = [moved(base, 0.065), moved(base, 0.07, 1), moved(base, 0.3)]
    with pytest.warns(PydetoxWarning, match=r"moved by 2: the weights lie 2\d\d%"):
        made = calibrate(base, images, suspects=[*suspects, moved(base, 2)], config=CONFIG)
    distances = [one.distance for one in (made, *made.rungs)]
    assert distances == [2.0**-4, 2.0**-3, 2.0**-2, 2.0**-1]
    assert made.models == (
        "mini, fine-tuned 1, moved by 0.062",
        "mini, fine-tuned 2, moved by 0.062",
    )
    # Copies of two distances share neither images nor seeds.
    assert not {*made.digests} & {*made.rungs[0].digests}
    path = tmp_path / "calibration.json"
    write_calibration(path, made)
    assert read_calibration(path) == made
    # It gives what the base alone gives.
    for suspect in (suspects[1], suspects[2]):
        stored = scan(suspect, images, base=base, calibration=made, config=CONFIG)
        alone = scan(suspect, images, base=base, config=CONFIG)
        assert stored.calibration == alone.calibration
        assert stored.detection == alone.detection
        assert stored.calibration is not None
        assert [count for count, _ in stored.calibration.sets] == [2, 2]
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


def test_the_nearer_copies_stand_alone_where_the_others_are_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[float]()

    def made(*_: object, distance: float, **__: object) -> Calibration:
        asked.append(distance)
        if distance > 0.2:
            raise OutOfReachError(f"no copy gets to {distance}")
        rows = ((0.2, 0.3), (0.21, 0.28))
        return Calibration(p_l1=rows, key="{}", models=("one", "two"), distance=distance)

    monkeypatch.setattr("pydetox.detect.references.calibrate_references", made)
    base, images = mini_model(), mini_images()
    plan = ReferencePlan.decide(CONFIG, base=base)
    near = plan.prepare(images, distance=0.15).calibration
    assert near is not None
    assert (near.distance, near.sets, asked) == (0.125, (), [0.125, 0.25])
    # Where those are out of reach that are the nearest, the others are not even tried.
    asked.clear()
    far = plan.prepare(images, distance=0.21)
    assert (far.calibration, far.unfit, asked) == (None, "no copy gets to 0.25", [0.25])
    both = plan.prepare(images, distance=0.09).calibration
    assert both is not None
    assert [count for count, _ in both.sets] == [2, 2]


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
    both = matched.with_rungs([replace(plain, distance=0.5)])
    assert around(both, {0.25: 0.3, 0.5: 0.7}) is not None
    # The nearer ones can stand alone, the others cannot.
    assert around(matched, {0.25: 0.6, 0.5: 0.4}) == matched
    assert around(matched, {0.25: 0.4, 0.5: 0.6}) is None
    other = matched.with_rungs([replace(plain, distance=0.5, key='{"steps": 7}')])
    with pytest.raises(UsageError, match="two distances are of different searches"):
        around(other, {0.25: 0.3, 0.5: 0.7})


def test_between_two_distances_the_location_is_interpolated_and_the_scatter_pooled() -> None:
    """Against the textbook formulas, of two classes, where the test is exactly Student's t."""
    rng = np.random.default_rng(0)
    logs = rng.normal(-3, 0.2, (5, 2))
    low, high = (
        Calibration(tuple(map(tuple, np.exp(rows).tolist())), "{}", names, distance=distance)
        for rows, names, distance in ((logs[:3], "abc", 0.25), (logs[3:], "de", 0.5))
    )
    found = around(low.with_rungs([high]), {0.25: 0.3, 0.5: 0.7})
    assert found is not None
    assert found.sets == ((3, 0.3), (2, 0.7))
    assert Calibration.from_dict(found.to_dict()) == found
    mean = 0.3 * logs[:3].mean(axis=0) + 0.7 * logs[3:].mean(axis=0)
    assert found.mean == pytest.approx(mean.tolist())
    suspect = np.array([-3.5, -2.9])
    apart = logs[:, 0] - logs[:, 1]
    variance = (apart[:3].var(ddof=1) * 2 + apart[3:].var(ddof=1)) / 3
    behind = 0.3**2 / 3 + 0.7**2 / 2
    t = (mean[0] - mean[1] - (suspect[0] - suspect[1])) / np.sqrt(variance * (1 + behind))
    detection = detect(np.exp(suspect).tolist(), found, has_classes=True)
    assert detection.p_value == pytest.approx(1 - (1 - stats.t.sf(t, 3)) ** 2)
    with pytest.raises(UsageError, match="sets of \\[3, 3\\] references, and 5 rows"):
        replace(found, sets=((3, 0.5), (3, 0.5)))
