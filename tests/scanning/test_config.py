import dataclasses
import json
from pathlib import Path

import pytest

from pydetox.errors import UsageError
from pydetox.scanning import ScannerConfig
from pydetox.scanning.config import EXECUTION


def test_the_defaults_are_those_of_a_single_scan() -> None:
    from pydetox.detect.configuration import ScanConfig

    assert ScannerConfig("x").scan_config() == ScanConfig()


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = ScannerConfig("x", base="b", known_vectors=("v", "w"), shard=(2, 3), timeout=5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert ScannerConfig.load(path) == config


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"images": 1},
        {"images": "x", "step": 3},
        {"images": "x", "steps": True},
        {"images": "x", "steps": 0},
        {"images": "x", "steps": 1.5},
        {"images": "x", "objective": "y"},
        {"images": "x", "shard": [3, 2]},
        {"images": "x", "shard": [1]},
        {"images": "x", "known_vectors": ["v"]},
        {"images": "x", "reference_models": ["a", "b"], "calibration": "c"},
        {"images": "x", "base": "b", "reference_models": ["a"]},
        {"images": "x", "timeout": float("nan")},
        {"images": "x", "address": "auto"},
    ],
)
def test_what_makes_no_sense_is_refused(content: dict) -> None:
    with pytest.raises(UsageError):
        ScannerConfig.from_dict(content)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_files_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        ScannerConfig.load(path)
    with pytest.raises(UsageError, match="nothing"):
        ScannerConfig.load(tmp_path / "nothing")


def test_the_digest_covers_all_that_decides_results_and_nothing_else() -> None:
    config = ScannerConfig("x", base="b")
    other = {
        "bool": lambda v: not v,
        "int": lambda v: v + 1,
        "float": lambda v: v * 2,
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value).__name__ not in other:
            continue
        changed = dataclasses.replace(config, **{field.name: other[type(value).__name__](value)})
        same = changed.digest({}) == config.digest({})
        assert same == (field.name in EXECUTION), field.name
    assert dataclasses.replace(config, workers=7, timeout=3.0).digest({}) == config.digest({})
    assert dataclasses.replace(config, images="y").digest({"images": "1"}) == config.digest(
        {"images": "1"}
    )
    assert config.digest({"images": "1"}) != config.digest({"images": "2"})
