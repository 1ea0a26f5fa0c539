"""JSON output: strict, and the same values back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pydetox.reporting import to_json, to_plain


class Colour(Enum):
    RED = "red"


class Verdict(str, Enum):
    CLEAN = "clean"


@dataclass(frozen=True)
class Inner:
    tensor: torch.Tensor
    path: Path


def test_every_type_that_results_are_made_of() -> None:
    value = {
        "none": None,
        "flag": True,
        "int": 3,
        "float": 0.1,
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "numpy": [np.float32(0.5), np.int64(7), np.bool_(True), np.float64("nan")],
        "array": np.array([[1.0, np.nan]]),
        "inner": Inner(torch.tensor([1.5, math.inf], requires_grad=True), Path("a/b")),
        "tuple": (1, 2),
        "set": {3, 1, 2},
        "enums": [Colour.RED, Verdict.CLEAN],
        7: "key",
        "text": "é \u202e",
    }

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    back = json.loads(to_json(value), parse_constant=refuse)
    assert back == {
        "none": None,
        "flag": True,
        "int": 3,
        "float": 0.1,
        "nan": None,
        "inf": [None, None],
        "numpy": [0.5, 7, True, None],
        "array": [[1.0, None]],
        "inner": {"tensor": [1.5, None], "path": "a/b"},
        "tuple": [1, 2],
        "set": [1, 2, 3],
        "enums": ["red", "clean"],
        "7": "key",
        "text": "é \u202e",
    }


def test_floats_survive_exactly() -> None:
    values = np.random.default_rng(0).normal(size=100).tolist()
    assert json.loads(to_json(values)) == values


def test_undecodable_file_names_can_be_written() -> None:
    assert to_json("x\udcff").encode("utf-8") == b'"x\\\\udcff"'


def test_one_line_on_request() -> None:
    assert to_json({"a": [1]}, indent=None) == '{"a": [1]}'
    assert not to_json({"a": 1}).endswith("\n")


@pytest.mark.parametrize("value", [object(), b"bytes", {"a": [lambda: None]}, Inner])
def test_unknown_types_are_named(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        to_plain(value)
