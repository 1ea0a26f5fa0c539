"""The report of `pydetox localize`: where the trigger vector sits, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import Bar, bar_chart
from .heat_map import heat_map
from .html import Html, cards, page, pairs, section, table, text
from .values import MISSING, number, percent

_SHARE_NOTE = (
    "Energy: share of the squared norm of the trigger vector. Density: that share over the share "
    "of the weights; 1 is average. Overlap: cosine with θ_b − θ_pre within the group."
)
_REMOVAL_NOTE = "The vector, times α, subtracted in one layer alone; “all” is the whole of it."
_XI_NOTE = (
    "ξ = share of clean images whose prediction the trigger vector changes, plus share of "
    "triggered images whose prediction the clean vector changes; 0 is perfect disentanglement."
)


def localization_report(result: Mapping[str, Any]) -> str:
    """Return the HTML page of a `pydetox localize` document (see the command)."""
    found = result["localization"]
    return page(
        "pydetox localize",
        str(result["name"]),
        [
            cards(
                [
                    {"label": "Target class", "value": result["target"]},
                    {"label": "α", "value": number(result["alpha"])},
                    {"label": "Overlap with θ_b − θ_pre", "value": number(found["overlap"])},
                ]
            ),
            _shares("Layers", found["layers"]),
            _shares("Modules", found["modules"]),
            _removals(found["removals"]),
            _disentanglement(found["disentanglement"]),
            _ranks(found["ranks"]),
            section("Provenance", pairs(result.get("provenance") or {})),
        ],
    )


def _shares(heading: str, groups: Sequence[Mapping[str, Any]]) -> Html:
    chart = bar_chart(
        [Bar(str(g["group"]), g["energy"]) for g in groups],
        title=f"{heading}: share of the trigger vector's energy",
        x_label="share of the energy",
        value_label="energy",
    )
    rows = [
        [
            text(g["group"]),
            text(percent(g["energy"])),
            text(number(g["density"])),
            text(number(g["overlap"])),
        ]
        for g in groups
    ]
    shown = table([heading, "Energy", "Density", "Overlap"], rows)
    return section(heading, chart, shown, note=_SHARE_NOTE)


def _removals(rows: Sequence[Mapping[str, Any]]) -> Html:
    if not rows:
        return Html("")
    cells = [
        [
            text(r["layer"]),
            text(percent(r["clean_accuracy"])),
            text(percent(r["attack_success_rate"])),
        ]
        for r in rows
    ]
    shown = table(["Removed in", "CA", "ASR"], cells)
    return section("Removal by layer", shown, note=_REMOVAL_NOTE)


def _disentanglement(found: Mapping[str, Any] | None) -> Html:
    if found is None:
        return Html("")
    chart = heat_map(
        found["first"],
        found["second"],
        found["error"],
        title="Disentanglement error ξ",
        row_label="α of the clean vector",
        column_label="α of the trigger vector",
        maximum=2.0,
        caption=f"Mean over [0, 1]²: {number(found['mean'])}.",
    )
    return section("Disentanglement", chart, note=_XI_NOTE)


def _ranks(rows: Sequence[Mapping[str, Any]]) -> Html:
    cells = [
        [
            text(r["name"]),
            text("×".join(map(str, r["shape"])) or MISSING),
            text(number(r["effective_rank"])),
            text(percent(r["top_energy"])),
        ]
        for r in rows
    ]
    shown = table(["Matrix", "Shape", "Effective rank", "Energy of the first"], cells, numeric=2)
    return section("Effective rank", shown)
