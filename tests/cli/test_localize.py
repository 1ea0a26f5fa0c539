"""`pydetox localize`."""

from __future__ import annotations

import json

import pytest
import torch

from pydetox.inversion.trigger_file import TriggerFile
from pydetox.repair.retention import DriftProbe, FeatureDrift

from .conftest import FAST, error_line


@pytest.fixture
def trigger(tmp_path):
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:9, 4:9] = 1
    file = TriggerFile(mask, torch.ones(1, 3, 16, 16), ("dog",), mask.double().mean(dim=(1, 2)))
    path = tmp_path / "trigger.safetensors"
    path.write_bytes(file.to_bytes())
    return path


def test_it_says_where_a_known_trigger_sits(run, folder, images, trigger, tmp_path):
    report = tmp_path / "report.html"
    result = run(
        "localize", folder / "suspect", *images, "--trigger", trigger, "--target", "dog",
        "--base", folder / "base", "--grid", "3", "--format", "json", "--report", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == "pydetox.localize/1"
    assert document["target"] == "dog"
    found = document["localization"]
    assert sum(one["energy"] for one in found["layers"]) == pytest.approx(1)
    assert {one["layer"] for one in found["removals"]} >= {"none", "all"}
    assert found["disentanglement"]["first"] == [-2.0, 0.0, 2.0]
    assert len(found["disentanglement"]["error"]) == 3
    assert -1 <= found["overlap"] <= 1
    page = report.read_text()
    assert "Disentanglement" in page
    assert "Effective rank" in page


def test_alpha_keeps_the_limit_of_drift(run, folder, images, trigger, monkeypatch):
    """As in `unlearn`: where every alpha moves features too far, nothing is subtracted."""
    far = FeatureDrift(1.0, 1.0, 1)
    monkeypatch.setattr(DriftProbe, "of", lambda probe, model: far)
    result = run("localize", folder / "suspect", *images, "--trigger", trigger, "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["alpha"] == 0


def test_without_a_trigger_it_recovers_one(run, folder, images):
    result = run(
        "localize", folder / "suspect", *images, "--target", "dog", *FAST, "--alpha", "0.5"
    )
    assert result.exit_code == 0, result.stderr
    assert "removed in all" in result.stdout
    assert "energy" in result.stdout


def test_wrong_usage(run, folder, images):
    result = run("localize", folder / "suspect", *images)
    assert result.exit_code == 4
    assert "--trigger, --target" in error_line(result)
    result = run("localize", folder / "suspect", *images, "--target", "cow boy", *FAST)
    assert result.exit_code == 4
    assert "'cow boy'" in error_line(result)
