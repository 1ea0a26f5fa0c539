"""The report of a whole run, from suspicion to repaired model, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..atomic import write_file
from .charts import Bar, bar_chart, percent_chart
from .html import (
    Html,
    badge,
    cards,
    details,
    image_strip,
    page,
    pairs,
    section,
    subsection,
    table,
    text,
)
from .images import png_data_uri
from .result import (
    ASR_NOTE,
    DRIFT_NOTE,
    PARETO_NOTE,
    VERDICT_TONES,
    alpha_series,
    any_given,
    drift_cells,
    is_flagged,
)
from .values import duration, finite, interval, number, percent
from .words import examples_section, words_section

_SCAN_NOTE = (
    "For every class, the smallest mask that sends clean images there is reconstructed. P-L1 is "
    "the sum of the mask's values, each in [0, 1], over the number of pixels. A backdoor is a "
    "class that needs far less than the others, and less than the same architecture needs when "
    "it is clean."
)
_DROPPED_NOTE = (
    "Classes marked with ≤ were given up on the way, because they could not become the outlier "
    "any more: their P-L1 is at most that, and the clean references are shown as they were at the "
    "same step."
)
_ALPHA_NOTE = (
    "The trigger vector, scaled by the coefficient α, is subtracted from the weights: too little "
    "leaves the backdoor, too much costs accuracy."
)


def write_detox_report(path: str | PathLike[str], result: Mapping[str, Any]) -> Path:
    """Write `result` as a self-contained HTML page to `path`, whole or not at all; return the path.

    result: every part is optional, None or NaN stands for "not known", shares are in [0, 1]:
      "title", "subtitle": str
      "summary": [{"label", "value", "tone": "good" | "bad" | "warn" | "neutral"}]
      "scans": [{"name", "verdict": "clean" | "suspicious" | "backdoored" | "inconclusive", "p_l1",
        "threshold", "anomaly_index", "score", "target": class name, "class_names": [C],
        "class_p_l1": [C], "reference_p_l1": [C] of a clean model, "class_steps": [C] of the
        search, "class_dropped": [C], the step at which a class was given up, or None}]
      "word_scans", "examples": of text models, see `reporting.words`
      "triggers": [{"caption", "image": uint8 [H, W, 3] or [H, W]}]
      "alpha_search": {"alpha": [S], "ca": [S], "asr": [S] or {trigger: [S]}, "asr_kind", "chosen",
        "drift": [S], see `reporting.result`, "pareto": the alphas that no other beats}
      "evaluation": [{"name", "ca", "ca_ci": (low, high), "asr", "asr_ci", "n_clean", "n_attack"}]
      "provenance": {name: value}
      "seconds": {step: seconds}
    All text is escaped. Raises OutputError when the file cannot be written, UsageError for series
    of different lengths and DataError for an image of another type.
    """
    return write_file(path, detox_report(result))


def detox_report(result: Mapping[str, Any]) -> str:
    """Return the HTML page of `write_detox_report`."""
    return page(
        str(result.get("title") or "pydetox report"),
        str(result.get("subtitle") or ""),
        [
            cards(result.get("summary") or []),
            _evaluation(result.get("evaluation") or []),
            _scans(result.get("scans") or []),
            words_section(result.get("word_scans") or []),
            examples_section(result.get("examples") or []),
            _triggers(result.get("triggers") or []),
            _alpha_search(result.get("alpha_search") or {}),
            _seconds(result.get("seconds") or {}),
            _provenance(result.get("provenance") or {}),
        ],
    )


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> Html:
    if not rows:
        return Html("")
    columns = [
        ("Clean accuracy (CA)", "ca", "n_clean"),
        ("Attack success rate (ASR)", "asr", "n_attack"),
    ]
    cells = [
        [text(row.get("name", "")), *(_share(row, key, count) for _, key, count in columns)]
        for row in rows
    ]
    shown = table(["Model", *(name for name, _, _ in columns)], cells, stack=True)
    return section("Accuracy and attack success", shown, note=ASR_NOTE)


def _share(row: Mapping[str, Any], key: str, count: str) -> Html:
    extra = interval(row.get(f"{key}_ci"))
    small = [f"[{extra}]"] if extra else []
    if row.get(count) is not None:
        small.append(f"n = {row[count]:,}")
    below = "".join(f'<span class="small">{text(line)}</span>' for line in small)
    return Html(f"<span>{text(percent(row.get(key)))}{below}</span>")


def _scans(scans: Sequence[Mapping[str, Any]]) -> Html:
    if not scans:
        return Html("")
    columns = [
        (name, key)
        for name, key in [
            ("P-L1", "p_l1"),
            ("Threshold", "threshold"),
            ("Anomaly index", "anomaly_index"),
            ("Score", "score"),
        ]
        if any_given(scans, key)
    ]
    cells = [
        [
            text(scan.get("name", "")),
            _verdict(scan),
            text(scan.get("target") or "–"),
            *(text(number(scan.get(key))) for _, key in columns),
        ]
        for scan in scans
    ]
    headers = ["Model", "Verdict", "Target class", *(name for name, _ in columns)]
    charted = [scan for scan in scans if scan.get("class_p_l1")]
    largest = max((v for scan in charted for v in shown_norms(scan)), default=0.0)
    charts = [scan_chart(scan, largest) for scan in charted]
    shown = table(headers, cells, numeric=3, stack=True)
    dropped = any(step is not None for scan in charted for step in _dropped(scan))
    note = f"{_SCAN_NOTE} {_DROPPED_NOTE}" if dropped else _SCAN_NOTE
    # Scans of text models have other charts.
    return section("Scans", shown, *charts, note=note if charted else "")


def _verdict(scan: Mapping[str, Any]) -> Html:
    verdict = str(scan.get("verdict") or "inconclusive")
    return badge(verdict, VERDICT_TONES.get(verdict, "neutral"))


def shown_norms(scan: Mapping[str, Any]) -> list[float]:
    """Return all mask norms that a scan's chart shows."""
    values = [*scan["class_p_l1"], *(scan.get("reference_p_l1") or []), scan.get("threshold")]
    return [v for value in values if (v := finite(value)) is not None]


def _dropped(scan: Mapping[str, Any]) -> Sequence[int | None]:
    return scan.get("class_dropped") or [None] * len(scan["class_p_l1"])


def scan_chart(scan: Mapping[str, Any], largest: float) -> Html:
    """Return the P-L1 of each class of a scan as a chart of [0, largest], and as numbers."""
    values: Sequence[float | None] = scan["class_p_l1"]
    names = scan.get("class_names") or [f"class {index}" for index in range(len(values))]
    references: Sequence[float | None] = scan.get("reference_p_l1") or [None] * len(values)
    bars = [
        Bar(str(name), value, reference, is_flagged(scan, index), bound=step is not None)
        for index, (name, value, reference, step) in enumerate(
            zip(names, values, references, _dropped(scan), strict=True)
        )
    ]
    name = str(scan.get("name", ""))
    chart = bar_chart(
        bars,
        title=f"Mask norm P-L1 of each class, {name}",
        x_label="mask norm P-L1 (share of the image)",
        value_label="this model",
        reference_label="clean reference",
        threshold=scan.get("threshold"),
        maximum=largest,
    )
    columns: dict[str, list[str]] = {
        "Class": [b.label for b in bars],
        "P-L1": [b.shown for b in bars],
    }
    if scan.get("reference_p_l1"):
        columns["Clean reference"] = [number(b.reference) for b in bars]
    if scan.get("class_steps"):
        columns["Steps"] = [str(steps) for steps in scan["class_steps"]]
    headers = list(columns)
    cells = [[text(cell) for cell in row] for row in zip(*columns.values(), strict=True)]
    heading = Html(f"{text(name)} {_verdict(scan)}")
    return subsection(heading, chart, details("The numbers", table(headers, cells)))


def _triggers(triggers: Sequence[Mapping[str, Any]]) -> Html:
    if not triggers:
        return Html("")
    images = [(png_data_uri(t["image"]), str(t.get("caption", ""))) for t in triggers]
    return section("Triggers", image_strip(images), note="Enlarged; each square is one pixel.")


def _alpha_search(search: Mapping[str, Any]) -> Html:
    alpha = list(search.get("alpha") or [])
    series = alpha_series(search)
    if not alpha or not series:
        return Html("")
    chosen = finite(search.get("chosen"))
    chart = percent_chart(
        alpha,
        series,
        title="CA and ASR over the scaling coefficient α",
        x_label="scaling coefficient α",
        y_label="share of test images (%)",
        marked=chosen,
        marked_label="" if chosen is None else f"chosen: α = {number(chosen)}",
    )
    drift, front = drift_cells(search), search.get("pareto") or ()
    cells = [
        [
            text(number(a) + " *" * any(abs(a - one) < 1e-9 for one in front)),
            *(text(percent(line.values[index])) for line in series),
            *(text(cell) for cell in (drift[index : index + 1] if drift else ())),
        ]
        for index, a in enumerate(alpha)
    ]
    headers = ["α", *(line.short for line in series), *(["Drift"] if drift else [])]
    numbers = table(headers, cells, numeric=0)
    note = " ".join(
        [_ALPHA_NOTE, *([DRIFT_NOTE] if drift else []), *([PARETO_NOTE] if front else [])]
    )
    return section("Search for α", chart, details("The numbers", numbers), note=note)


def _seconds(seconds: Mapping[str, Any]) -> Html:
    if not seconds:
        return Html("")
    cells = [[text(step), text(duration(value))] for step, value in seconds.items()]
    return section("Time", table(["Step", "Time"], cells))


def _provenance(provenance: Mapping[str, Any]) -> Html:
    return section("Provenance", pairs(provenance)) if provenance else Html("")
