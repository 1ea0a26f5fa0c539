"""The result of a run over many checkpoints as one HTML page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .detox import scan_chart, shown_norms
from .html import (
    Html,
    badge,
    cards,
    image_strip,
    page,
    pairs,
    section,
    subsection,
    table,
    text,
)
from .images import png_data_uri
from .pictures import PICTURES
from .result import VERDICT_TONES, control_line
from .run import by_urgency, compared_with, count_cards, explained
from .values import MISSING, duration, number, percent

#: Returns the pictures of a result, PNG by name, given the result.
Pictures = Callable[[Mapping[str, Any]], Mapping[str, bytes]]

# Clean ones beyond that stay in the table alone: a page has to open on a phone.
_DETAILED_CLEAN = 20

_NOTE = (
    "For every class, the smallest mask that sends clean images there is reconstructed, and "
    "compared with what clean references need. P-L1 is the sum of the mask's values, each in "
    "[0, 1], over the number of pixels."
)


def run_page(document: Mapping[str, Any], pictures: Pictures) -> str:
    """Return the page of a run: counts, what needs a person, then each checkpoint.

    document: see `run_document`. All text in it is escaped.
    """
    results = by_urgency(document["results"])
    urgent = [r for r in results if r["verdict"] != "clean"]
    clean = [r for r in results if r["verdict"] == "clean"][:_DETAILED_CLEAN]
    charted = [r for r in [*urgent, *clean] if r.get("class_p_l1")]
    largest = max((v for r in charted for v in shown_norms(r)), default=0.0)
    details = [
        _one(r, largest, {} if r.get("duplicate_of") else pictures(r)) for r in [*urgent, *clean]
    ]
    return page(
        "pydetox scan",
        compared_with(document),
        [
            cards(count_cards(document)),
            _attention(urgent),
            _not_reached(document["not_reached"]),
            section("All checkpoints", _table(results), note=_NOTE) if results else Html(""),
            section("One by one", *details) if details else Html(""),
            _ignored(document["ignored"]),
        ],
    )


def _attention(results: Sequence[Mapping[str, Any]]) -> Html:
    if not results:
        return Html("")
    rows = [[text(r["name"]), _badge(r), text(r["reason"])] for r in results]
    shown = table(["Checkpoint", "Verdict", "Why"], rows, numeric=3, stack=True)
    return section("Needs a person", shown)


def _table(results: Sequence[Mapping[str, Any]]) -> Html:
    rows = [
        [
            text(r["name"]),
            _badge(r),
            text(r.get("target") or MISSING),
            *(text(number(r.get(key))) for key in ("p_l1", "threshold", "score")),
            text(percent((r.get("weights") or {}).get("relative"))),
            text(duration(sum(r["seconds"].get(k, 0) for k in ("survey", "total")))),
        ]
        for r in results
    ]
    headers = [
        "Checkpoint",
        "Verdict",
        "Target class",
        "P-L1",
        "Threshold",
        "Score",
        "Distance to base",
        "Time",
    ]
    return table(headers, rows, numeric=3, stack=True)


def _one(result: Mapping[str, Any], largest: float, pictures: Mapping[str, bytes]) -> Html:
    parts = [Html(f"<p>{text(explained(result))}</p>")]
    images = [
        (png_data_uri(np.asarray(Image.open(io.BytesIO(pictures[f"{name}.png"])))), caption)
        for name, caption in PICTURES.items()
        if f"{name}.png" in pictures
    ]
    if images:
        parts.append(image_strip(images))
    if result.get("class_p_l1") and not result.get("duplicate_of"):
        parts.append(scan_chart(result, largest))
    weights = result.get("weights") or {}
    facts: dict[str, object] = {}
    for number_, finding in enumerate(result.get("findings") or (), 1):
        facts[f"Finding {number_} ({finding['rule']})"] = finding["message"]
    if result.get("positive_control"):
        facts["Positive control"] = control_line(result["positive_control"])
    if weights.get("layers"):
        facts["Layers that moved most"] = ", ".join(
            f"{one['name']} ({percent(one['share'])})" for one in weights["layers"]
        )
    if weights.get("mismatch"):
        facts["Not comparable with the base"] = weights["mismatch"]
    for one in weights.get("known") or []:
        facts[f"Cosine with {one['name']}"] = number(one["cosine"])
    if result.get("sha256"):
        facts["SHA-256"] = result["sha256"]
    parts.append(pairs(facts))
    return subsection(Html(f"{text(result['name'])} {_badge(result)}"), *parts)


def _not_reached(names: Sequence[str]) -> Html:
    if not names:
        return Html("")
    rows = [[text(name)] for name in names]
    note = "The run ended before these. They are not clean; run the same command again."
    return section("Not reached", table(["Checkpoint"], rows), note=note)


def _ignored(entries: Sequence[Mapping[str, Any]]) -> Html:
    if not entries:
        return Html("")
    rows = [[text(one["name"]), text(one["reason"])] for one in entries]
    return section("Passed over", table(["File", "Why"], rows, numeric=2, stack=True))


def _badge(result: Mapping[str, Any]) -> Html:
    return badge(result["verdict"], VERDICT_TONES[result["verdict"]])
