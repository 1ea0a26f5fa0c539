"""--quick and --thorough stand for values of other options, which win if they are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from pydetox.cli import cli
from pydetox.cli.options import apply_preset
from pydetox.detect.configuration import ScanConfig
from pydetox.presets import SCAN_PRESETS, UNLEARN_PRESETS
from pydetox.repair.configuration import UnlearnConfig


def given(command: str, *arguments: str) -> dict[str, Any]:
    """Return the options of a command after its presets."""
    found = cli.get_command(None, command)  # type: ignore[arg-type]
    assert found is not None
    with found.make_context(command, ["x", "--images", "y", *arguments]) as context:
        values = dict(context.params)
        presets = [SCAN_PRESETS, UNLEARN_PRESETS] if command == "unlearn" else [SCAN_PRESETS]
        apply_preset(values, *presets)
    return values


@pytest.mark.parametrize("name", ["quick", "thorough"])
def test_a_preset_is_that_of_the_library(name: str) -> None:
    values = given("unlearn", "--output", "z", f"--{name}")
    scan: ScanConfig = getattr(ScanConfig, name)()
    vector: UnlearnConfig = getattr(UnlearnConfig, name)()
    assert values["steps"] == scan.inversion.steps != ScanConfig().inversion.steps
    assert values["batch_size"] == scan.inversion.batch_size
    assert values["families"] == scan.families
    assert (values["restarts"], values["references"]) == (scan.restarts, scan.references)
    assert values["vector_steps"] == vector.steps != UnlearnConfig().steps
    assert (values["passes"], values["warps"]) == (vector.passes, vector.warps)
    assert values["waves"] == vector.waves
    assert given("scan", f"--{name}")["steps"] == values["steps"]


def test_without_one_nothing_changes() -> None:
    values = given("scan")
    assert "quick" not in values
    assert values["steps"] == ScanConfig().inversion.steps


def test_what_is_given_wins(tmp_path: Path) -> None:
    # Even the default's own value, or one of a file.
    assert given("scan", "--thorough", "--steps", "150")["steps"] == 150
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"steps": 7, "quick": True, "families": ["blend"]}))
    values = given("scan", "--config", str(file))
    assert (values["steps"], values["families"]) == (7, ("blend",))
    assert values["batch_size"] == ScanConfig.quick().inversion.batch_size
    with pytest.raises(click.UsageError, match="exclude each other"):
        given("scan", "--config", str(file), "--thorough")
