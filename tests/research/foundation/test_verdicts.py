"""False alarms and detections of defaults alone: the plan, the figures, and a run of seconds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydetox.detect.configuration import ScanConfig
from pydetox.detect.statistics import Calibration
from pydetox.research.foundation.verdicts import (
    VerdictPlan,
    drawn_models,
    learning_rates,
    quick_verdict_plan,
    run_verdicts,
    rung_rows,
    summarize_verdicts,
)


def test_what_is_reported_is_the_default() -> None:
    plan = VerdictPlan()
    assert plan.scan == ScanConfig()
    assert plan.clean >= 40
    rates = learning_rates(plan, plan.clean)
    assert rates[:9] == learning_rates(plan, 9)
    # Ten models cover both decades without a gap, and so do more.
    for count in (10, plan.clean):
        some = np.sort(np.log10([plan.rates[0], *rates[:count], plan.rates[1]]))
        assert np.diff(some).max() < 6 / count
    drawn = drawn_models(plan)
    assert sum(victim.attack is None for victim, _ in drawn) == plan.clean
    assert len({(victim.seed, victim.attack) for victim, _ in drawn}) == len(drawn)
    # A run that is stopped half-way has judged about half of each kind.
    half = [victim.attack for victim, _ in drawn[: len(drawn) // 2]]
    for attack, count in [(None, plan.clean), *((a, plan.backdoored) for a in plan.attacks)]:
        assert half.count(attack) == pytest.approx(count / 2, abs=1)


def test_figures_count_what_they_say() -> None:
    def row(attack: str | None, verdict: str, **more: Any) -> dict[str, Any]:
        common = {"counts": True, "target_right": False, "seconds": 2.0, "reference_seconds": 1.0}
        return {**common, "attack": attack, "verdict": verdict, **more}

    rows = [
        row(None, "clean"),
        row(None, "suspicious"),
        row(None, "backdoored"),
        row(None, "inconclusive"),
        row("badnets", "backdoored", target_right=True),
        row("badnets", "clean"),
        row("blended", "clean", counts=False),
    ]
    found = summarize_verdicts(rows)
    assert (found["default.fpr"], found["default.fpr_models"]) == (0.5, 4)
    assert found["default.fpr_backdoored"] == 0.25
    assert found["default.inconclusive"] == 0.25
    assert (found["default.tpr"], found["default.tpr_models"]) == (0.5, 2)
    assert found["default.target_right"] == 0.5
    assert found["default.tpr_low"] < 0.5 < found["default.tpr_high"]
    assert (found["default.seconds"], found["default.reference_seconds"]) == (2.0, 1.0)


def test_how_references_depend_on_their_distance() -> None:
    first = Calibration(((0.1, 0.2), (0.1, 0.2 * math.e)), "k", ("a", "b"), distance=0.25)
    second = replace(first, p_l1=((0.1 * math.e, 0.2), (0.1 * math.e, 0.2)), distance=0.5)
    near, far = rung_rows([first, second])
    assert near["deviation"] == pytest.approx(math.sqrt(0.5))
    # Class effects: from -log(2)/2 - 1/4 and more by as much, to 1/2 - log(2)/2 and less.
    assert [near["largest_change"], near["change"]] == pytest.approx([0.75, 0.75])
    assert (near["distance"], far["distance"], far["deviation"]) == (0.25, 0.5, 0)
    assert far["change"] is None


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = list[str]()
    plan = quick_verdict_plan()
    found = run_verdicts(plan, lines.append)
    assert len(found["rows"]) == plan.clean
    assert all(row["attack"] is None and row["distance"] > 0 for row in found["rows"])
    kinds = Counter(path.name.rpartition("-")[0] for path in tmp_path.rglob("*.*"))
    assert kinds["verdict"] == kinds["victim"] == plan.clean
    assert kinds["verdict-references"] >= 2
    # Nothing is done twice, by a run of more models either.
    monkeypatch.setattr("pydetox.research.foundation.verdicts.scan", None)
    monkeypatch.setattr("pydetox.research.foundation.verdicts.calibrate_references", None)
    assert run_verdicts(plan) == found
    for row in found["rungs"]:
        assert row["family"] == "patch"
        assert row["deviation"] >= 0
    stopped = run_verdicts(replace(plan, clean=3), lines.append, minutes=0)
    assert (stopped["rows"], lines[-1][:7]) == ([], "stopped")
