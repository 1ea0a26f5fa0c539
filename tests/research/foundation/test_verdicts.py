"""False alarms and detections of defaults alone: the plan, the figures, and a run of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pydetox.detect.configuration import ScanConfig
from pydetox.research.foundation.verdicts import (
    VerdictPlan,
    drawn_models,
    learning_rates,
    quick_verdict_plan,
    run_verdicts,
    summarize_verdicts,
)


def test_what_is_reported_is_the_default() -> None:
    plan = VerdictPlan()
    assert plan.scan == ScanConfig()
    assert plan.clean >= 40
    rates = learning_rates(plan, plan.clean)
    assert rates == sorted(rates)
    assert rates[-1] / rates[0] > 80
    drawn = [one for task in plan.tasks for one in drawn_models(plan, task)]
    assert sum(victim.attack is None for victim, _ in drawn) == plan.clean
    assert len({(victim.seed, victim.attack) for victim, _ in drawn}) == len(drawn)


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


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = list[str]()
    plan = quick_verdict_plan()
    found = run_verdicts(plan, lines.append)
    assert len(found["rows"]) == len(lines) == plan.clean
    assert all(row["attack"] is None and row["distance"] > 0 for row in found["rows"])
    assert run_verdicts(plan) == found  # from the cache
