"""Numbers that a caller gives."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pydetox.errors import UsageError
from pydetox.numbers import require_number, require_whole


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_python_and_numpy(value: object) -> None:
    found = require_whole("epochs", value, 3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize(
    "value", [2, 3.0, True, "3", None, math.nan, [3], np.array([3]), torch.tensor(3)]
)
def test_anything_else_is_no_whole_number(value: object) -> None:
    with pytest.raises(UsageError, match=r"^epochs is .*; expected a whole number of at least 3"):
        require_whole("epochs", value, 3)


@pytest.mark.parametrize(
    "value",
    [0.5, Fraction(1, 2), np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([0.5])],
)
def test_numbers_of_every_kind(value: object) -> None:
    found = require_number("rate", value, above=0)
    assert (found, type(found)) == (0.5, float)
    assert require_number("rate", -2) == -2.0


@pytest.mark.parametrize(
    "value",
    [0, -1, True, "0.5", None, math.nan, math.inf, [0.5], 1j, torch.ones(2), np.ones((0,))],
)
def test_anything_else_is_no_number(value: object) -> None:
    with pytest.raises(UsageError, match=r"(?s)^rate is .*; expected a finite number above 0, a"):
        require_number("rate", value, above=0, meaning=", a share")
