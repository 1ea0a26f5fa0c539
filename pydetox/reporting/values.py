"""How numbers and foreign text are written in reports: one place, so that all outputs agree."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import SupportsFloat

MISSING = "–"


def clean_text(value: object) -> str:
    """Return `value` as one line of text without control or direction-changing characters.

    Class names, file names and checkpoint metadata come from files: an escape sequence in one of
    them must not reach the terminal, a lone surrogate must not stop the report from being written.
    """
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    # Cc: control, Cf: format (bidirectional overrides, zero-width), Zl and Zp: line and paragraph
    # separators.
    return "".join(
        c if c == " " or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp") else "\ufffd"
        for c in text
    )


def finite(value: SupportsFloat | None) -> float | None:
    """Return `value` as a float, or None when it is None, NaN or infinite."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def percent(share: SupportsFloat | None, digits: int = 1) -> str:
    """Write a share in [0, 1] as a percentage; "–" for None and NaN."""
    number = finite(share)
    return MISSING if number is None else f"{100 * number:.{digits}f}%"


def interval(bounds: Sequence[SupportsFloat | None] | None, digits: int = 1) -> str:
    """Write a confidence interval of shares as "97.2–99.1%"; "" when there is none."""
    if bounds is None:
        return ""
    low, high = (finite(bound) for bound in bounds)
    if low is None or high is None:
        return ""
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}%"


def number(value: SupportsFloat | None) -> str:
    """Write a number with three significant digits; "–" for None and NaN."""
    finite_value = finite(value)
    if finite_value is None:
        return MISSING
    size = abs(finite_value)
    if size != 0 and not 1e-4 <= size < 1e6:
        return f"{finite_value:.2e}"
    digits = 2 if size == 0 else max(0, 2 - math.floor(math.log10(size)))
    return f"{finite_value:,.{digits}f}"


def at_most(value: SupportsFloat | None, bound: bool) -> str:
    """Write a number, one that is only an upper bound as "≤ 0.0123"; "–" for None and NaN."""
    written = number(value)
    return f"≤ {written}" if bound and written != MISSING else written


def duration(seconds: SupportsFloat | None) -> str:
    """Write seconds as "0.42 s", "12.3 s" or "3 min 05 s"; "–" for None and NaN."""
    value = finite(seconds)
    if value is None:
        return MISSING
    if value < 59.95:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"
