"""Numbers and foreign text as they appear in every report."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pydetox.reporting.values import (
    at_most,
    clean_text,
    duration,
    finite,
    interval,
    number,
    percent,
)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.00"),
        (0.0187, "0.0187"),
        (0.10449, "0.104"),
        (1.2, "1.20"),
        (12.345, "12.3"),
        (1234.6, "1,235"),
        (-0.5, "-0.500"),
        (1e-7, "1.00e-07"),
        (2e9, "2.00e+09"),
        (None, "–"),
        (math.nan, "–"),
        (-math.inf, "–"),
        (np.float32(0.5), "0.500"),
        (torch.tensor(0.25), "0.250"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_bounds() -> None:
    assert at_most(0.0187, True) == "≤ 0.0187"
    assert at_most(0.0187, False) == "0.0187"
    assert at_most(None, True) == at_most(math.inf, True) == "–"


def test_shares() -> None:
    assert percent(0.9973) == "99.7%"
    assert percent(1) == "100.0%"
    assert percent(None) == percent(math.nan) == "–"
    assert interval((0.9549, 0.984)) == "95.5–98.4%"
    assert interval(None) == interval((None, 0.5)) == interval((0.1, math.nan)) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.417, "0.42 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3605, "60 min 05 s"),
        (None, "–"),
    ],
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_finite() -> None:
    assert finite(np.float64(2.5)) == 2.5
    assert finite(math.inf) is finite(math.nan) is finite(None) is None


def test_clean_text_leaves_nothing_that_acts() -> None:
    assert clean_text("zéro 零 7") == "zéro 零 7"
    assert clean_text("a\x1b[31mb\x00\r\nc\x9bd") == "a\ufffd[31mb\ufffd\ufffd\ufffdc\ufffdd"
    assert clean_text("safe\u202etxt.exe\u2028") == "safe\ufffdtxt.exe\ufffd"
    assert clean_text("bad\udcffname") == r"bad\udcffname"
    assert clean_text(3.5) == "3.5"
