"""One plan of what a verdict compares with: decided from what is given, before any work."""

from __future__ import annotations

from typing import Any

import pytest

from pydetox.detect.configuration import ScanConfig
from pydetox.detect.references import ReferencePlan
from pydetox.detect.statistics import Calibration
from pydetox.errors import UsageError
from pydetox.inversion import InversionConfig
from pydetox.training import TrainConfig


def calibration(*, relative: bool) -> Calibration:
    rows = ((0.2, 0.3, 0.25), (0.21, 0.28, 0.26))
    return Calibration(p_l1=rows, key="{}", models=("one", "two"), relative=relative)


PLAIN, RELATIVE = calibration(relative=False), calibration(relative=True)


@pytest.mark.parametrize(
    ("given", "contrast", "base", "makes", "compares"),
    [
        ({}, False, None, False, False),
        ({"base": "b"}, False, "b", True, True),
        ({"references": ["r", "s"]}, False, None, True, True),
        ({"base": "b", "references": ["r", "s"]}, True, "b", True, True),
        ({"calibration": PLAIN}, False, None, False, True),
        ({"calibration": PLAIN, "base": "b"}, False, None, False, True),
        ({"calibration": RELATIVE, "base": "b"}, True, "b", False, True),
    ],
)
def test_what_is_given_decides(
    given: dict[str, Any], contrast: bool, base: str | None, makes: bool, compares: bool
) -> None:
    plan = ReferencePlan.decide(**given)
    assert plan.config.contrast is contrast
    assert plan.base == base
    assert (plan.makes_calibration, plan.compares) == (makes, compares)


def test_what_the_configuration_says_is_kept() -> None:
    plain = ReferencePlan.decide(ScanConfig(contrast=False), base="b", references=["r", "s"])
    assert plain.config.contrast is False
    assert plain.base is None
    free = ScanConfig("label-free")
    assert ReferencePlan.decide(free, base="b", references=["r", "s"]).config.contrast is True
    # Copies that move as far as the suspect will do; those that move as told include the base.
    assert ReferencePlan.decide(free, base="b").config.contrast is True
    told = ScanConfig("label-free", reference_training=TrainConfig(1, 1e-4))
    assert ReferencePlan.decide(told, base="b").config.contrast is False
    assert ReferencePlan.decide(free).config.contrast is False
    # A success that the user asked for is asked for in contrast, too.
    mine = ScanConfig(inversion=InversionConfig(success_threshold=0.8)).in_contrast()
    assert mine.search("patch").success_threshold == 0.8
    assert ScanConfig().search("patch").success_threshold == 0.97
    assert ScanConfig().in_contrast().search("patch").success_threshold == 0.9


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (None, {"references": ["r"]}, "1 reference model; a calibration needs at least 2"),
        (None, {"references": ["r", "s"], "calibration": PLAIN}, "exclude each other"),
        (None, {"calibration": RELATIVE}, "made in contrast to a base: give that base="),
        (ScanConfig(contrast=True), {}, "needs it: give base="),
        (ScanConfig(contrast=True), {"references": ["r", "s"]}, "needs it: give base="),
        (ScanConfig(contrast=True), {"base": "b"}, "nothing to compare with: give references="),
    ],
)
def test_what_makes_no_sense_is_refused(
    config: ScanConfig | None, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ReferencePlan.decide(config, **given)
