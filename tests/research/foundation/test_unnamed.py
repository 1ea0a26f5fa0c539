"""A defender who knows some of the classes: what it is given, the figures, and a run of seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pydetox.data import ImageSet
from pydetox.detect.configuration import ScanConfig
from pydetox.repair.configuration import UnlearnConfig
from pydetox.research.data import load_task
from pydetox.research.foundation.unnamed import (
    UnnamedPlan,
    defender_images,
    drawn_names,
    quick_unnamed_plan,
    run_unnamed,
    summarize_unnamed,
)


def test_what_is_reported_is_the_default() -> None:
    plan = UnnamedPlan()
    assert (plan.scan, plan.repair) == (ScanConfig(), UnlearnConfig())
    assert (plan.images, plan.names) == (500, 10)


def test_the_defender_has_images_of_all_classes_and_names_of_some() -> None:
    named = drawn_names(40, [7, 33, 7], 10, 3)
    assert named == sorted(set(named))
    assert (len(named), {7, 33} <= set(named)) == (10, True)
    assert named == drawn_names(40, [7, 33], 10, 3) != drawn_names(40, [7, 33], 10, 4)
    labels = torch.arange(80) % 40
    pixels = labels.to(torch.uint8)[:, None, None, None].expand(80, 3, 4, 4)
    whole = ImageSet(pixels, labels, tuple(f"class {c}" for c in range(40)), "all")
    given = defender_images(whole, named, 60, 3)
    assert given.labels is None
    assert given.class_names == tuple(f"class {c}" for c in named)
    assert len(given) == 60
    outside = set(given.images[:, 0, 0, 0].tolist()) - set(named)
    assert len(outside) > 20


def test_figures_count_what_they_say() -> None:
    def planted(asr: float, others: float, **more: Any) -> dict[str, Any]:
        before = {"named": 0.8, "others": 0.8, "all": 0.8}
        after = {"named": 0.8, "others": others, "all": 0.6}
        found = {"attack": "badnets", "counts": True, "target_right": True, "rescan": "clean"}
        return {**found, "asr_before": 0.9, "asr": asr, "ca_before": before, "ca": after, **more}

    found = summarize_unnamed(
        [
            {"attack": None, "verdict": "suspicious"},
            {"attack": None, "verdict": "clean"},
            planted(0.0, 0.8),
            planted(0.1, 0.4, rescan=None, target_right=False),
            planted(1.0, 0.0, counts=False),
        ]
    )
    expected = {
        "models_clean": 2,
        "models_backdoored": 2,
        "fpr": 0.5,
        "backdoored": 0,
        "found": 0.5,
        "repaired": 0.5,
        "asr_before": 0.9,
        "asr": 0.05,
        "named_kept": 1,
        "others_kept": 0.75,
        "others_kept_min": 0.5,
        "all_kept": 0.75,
    }
    assert found == pytest.approx({f"emoji40.{name}": value for name, value in expected.items()})


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Digits stand for emoji, which not every machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def digits(name: str, *, seed: int, image_size: int) -> Any:
        return replace(load_task("digits", seed=seed, image_size=image_size), name=name)

    monkeypatch.setattr("pydetox.research.foundation.victims.load_task", digits)
    monkeypatch.setattr("pydetox.detect.copies.STEPS", 8)
    plan = replace(quick_unnamed_plan(), names=4)
    lines = list[str]()
    found = run_unnamed(plan, lines.append)
    clean, planted = found["rows"]
    assert (clean["attack"], planted["attack"]) == (None, "badnets")
    assert len(found["named"]) == 4
    assert planted["ca_before"]["all"] == pytest.approx(
        # Test images are not spread evenly over the ten digits.
        0.4 * planted["ca_before"]["named"] + 0.6 * planted["ca_before"]["others"],
        abs=0.05,
    )
    monkeypatch.setattr("pydetox.research.foundation.unnamed.scan", None)
    monkeypatch.setattr("pydetox.research.foundation.unnamed.detox", None)
    assert run_unnamed(plan) == found
