"""The report of a run as text tables for the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .result import (
    ASR_NOTE,
    DRIFT_NOTE,
    P_L1_NOTE,
    PARETO_NOTE,
    VERDICT_TONES,
    alpha_series,
    any_given,
    drift_cells,
)
from .values import MISSING, clean_text, duration, finite, interval, number, percent

_STYLES = {"good": "green", "bad": "bold red", "warn": "yellow"}

# In a pipe there is no terminal to ask, and wrapped tables cannot be searched.
_PIPE_WIDTH = 120


def print_text(result: Mapping[str, Any]) -> None:
    """Print a result as text to stdout; at a terminal in colour and as wide as that is."""
    if sys.stdout.isatty():
        _print(Console(file=sys.stdout), result)
    else:
        sys.stdout.write(render_text(result))


def render_text(result: Mapping[str, Any], *, width: int = _PIPE_WIDTH) -> str:
    """Return a result as plain text, tables of `width` columns.

    result: see `pydetox.reporting.write_detox_report`. Images and provenance are left to the HTML
    report. Control characters in names never reach the text.
    """
    buffer = io.StringIO()
    _print(Console(file=buffer, width=width, color_system=None, force_terminal=False), result)
    return buffer.getvalue()


def _print(console: Console, result: Mapping[str, Any]) -> None:
    if result.get("title"):
        console.print(_text(result["title"], "bold"))
    if result.get("subtitle"):
        console.print(_text(result["subtitle"], "dim"))
    if summary := result.get("summary"):
        grid = Table.grid(padding=(0, 2))
        for item in summary:
            style = _STYLES.get(str(item.get("tone")), "")
            grid.add_row(_text(item.get("label", "")), _text(item.get("value", ""), style))
        console.print(grid)
    for table in (
        _scans(result.get("scans") or []),
        _words(result.get("words") or []),
        _evaluation(result.get("evaluation") or []),
        _alpha_search(result.get("alpha_search") or {}),
        _seconds(result.get("seconds") or {}),
    ):
        if table is not None:
            console.print()
            console.print(table)
    if any_given(result.get("scans") or [], "p_l1"):
        console.print(_text(P_L1_NOTE, "dim"))
    if result.get("evaluation"):
        console.print(_text(ASR_NOTE, "dim"))
    if (result.get("alpha_search") or {}).get("drift"):
        console.print(_text(DRIFT_NOTE, "dim"))
    if (result.get("alpha_search") or {}).get("pareto"):
        console.print(_text(PARETO_NOTE, "dim"))


def _text(content: object, style: str = "") -> Text:
    return Text(clean_text(content), style=style)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _scans(scans: Sequence[Mapping[str, Any]]) -> Table | None:
    if not scans:
        return None
    columns = [
        (name, key)
        for name, key in [
            ("P-L1", "p_l1"),
            ("threshold", "threshold"),
            ("anomaly index", "anomaly_index"),
            ("score", "score"),
        ]
        if any_given(scans, key)
    ]
    table = _table("Scans", ["model", "verdict", "target class"], [name for name, _ in columns])
    for scan in scans:
        verdict = str(scan.get("verdict") or "inconclusive")
        table.add_row(
            _text(scan.get("name", "")),
            _text(verdict, _STYLES.get(VERDICT_TONES.get(verdict, ""), "")),
            _text(scan.get("target") or MISSING),
            *(number(scan.get(key)) for _, key in columns),
        )
    return table


def _words(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    if not rows:
        return None
    table = _table("Words", ["model", "class", "words"], ["success", "loss"])
    for row in rows:
        table.add_row(
            *(_text(row.get(key, "")) for key in ("name", "class", "text")),
            percent(row.get("success")),
            number(row.get("loss")),
        )
    return table


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    if not rows:
        return None
    table = _table("Accuracy and attack success", ["model"], ["CA", "ASR"])
    for row in rows:
        table.add_row(_text(row.get("name", "")), _share(row, "ca"), _share(row, "asr"))
    return table


def _share(row: Mapping[str, Any], key: str) -> str:
    bounds = interval(row.get(f"{key}_ci"))
    return percent(row.get(key)) + (f" [{bounds}]" if bounds else "")


def _alpha_search(search: Mapping[str, Any]) -> Table | None:
    alpha, series = list(search.get("alpha") or []), alpha_series(search)
    if not alpha or not series:
        return None
    chosen = finite(search.get("chosen"))
    drift = drift_cells(search)
    names = [clean_text(line.short) for line in series] + (["drift"] if drift else [])
    table = _table("Search for α", ["α"], names)
    for index, value in enumerate(alpha):
        on_front = any(abs(value - one) < 1e-9 for one in search.get("pareto") or ())
        is_chosen = chosen is not None and abs(value - chosen) < 1e-9
        table.add_row(
            _text(number(value) + (" *" * on_front) + (" (chosen)" if is_chosen else "")),
            *(percent(line.values[index]) for line in series),
            *(drift[index : index + 1] if drift else ()),
            style="bold" if is_chosen else "",
        )
    return table


def _seconds(seconds: Mapping[str, Any]) -> Table | None:
    if not seconds:
        return None
    table = _table("Time", ["step"], ["time"])
    for step, value in seconds.items():
        table.add_row(_text(step), duration(value))
    return table
