"""What the HTML and the text report both need to know about a result dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from .charts import Series
from .values import number, percent

VERDICT_TONES = {
    "clean": "good",
    "suspicious": "warn",
    "backdoored": "bad",
    "inconclusive": "neutral",
    "error": "warn",
    "skipped": "neutral",
}

ASR_NOTE = (
    "CA: share of clean test images or texts that get their own class. ASR: share of triggered "
    "ones that are sent to the target class; those of the target class are left out. In brackets: "
    "95% Wilson interval."
)

P_L1_NOTE = (
    "P-L1: the size of a trigger, as the share of the image that it covers (the sum of its mask "
    "over the number of pixels, 0 to 1). It says nothing alone: a clean model's classes have sizes "
    "of their own, and a verdict compares with those."
)

DRIFT_NOTE = (
    "Drift: how far the model's image features have moved from those before the repair, the mean "
    "of 1 - cos on images made of the given ones that belong to no class. It stands for classes "
    "and tasks that were not measured."
)


PARETO_NOTE = "*: no other α is as good in CA, ASR and drift at once (the Pareto front)."


def alpha_series(search: Mapping[str, Any]) -> list[Series]:
    """Return the lines of an "alpha_search" part: CA first, then one ASR per kind of trigger.

    search["asr"]: shares, with search["asr_kind"] naming the trigger ("recovered", "true"), or a
    mapping from that name to shares.
    """
    series = []
    if search.get("ca") is not None:
        series.append(Series("CA: clean accuracy", list(search["ca"]), "CA"))
    asr = search.get("asr")
    if isinstance(asr, Mapping):
        for kind, values in asr.items():
            label = f"ASR: attack success rate, {kind} trigger"
            series.append(Series(label, list(values), f"ASR {kind}"))
    elif asr is not None:
        kind = search.get("asr_kind")
        label = "ASR: attack success rate" + (f", {kind} trigger" if kind else "")
        series.append(Series(label, list(asr), "ASR"))
    return series


def drift_cells(search: Mapping[str, Any]) -> list[str] | None:
    """Return the column "drift" of an "alpha_search" part as text; None where it was not measured.

    search["drift"]: mean of 1 - cos of image features per alpha. Raises UsageError for another
    number of them than of alphas.
    """
    drift = search.get("drift") or None
    if drift is None:
        return None
    if len(drift) != len(search["alpha"]):
        raise UsageError(f"{len(drift)} drifts for {len(search['alpha'])} α; expected as many")
    return [number(value) for value in drift]


def control_line(control: Mapping[str, Any]) -> str:
    """Return what a positive control says about the power of a scan, in one line.

    control: The part "positive_control" of a scan's document.
    """
    what = (
        f"a patch of {percent(control['p_l1'])} of the pixels into {control['target']!r}, planted "
        f"in a copy of the model (ASR {percent(control['asr'])})"
    )
    if not control["planted"]:
        return f"{what}, hardly works: this control shows nothing"
    p_value = control["p_value"]
    chance = "" if p_value is None else f", p = {p_value:.2g}"
    if control["found"]:
        return f"{what}, is found by the same scan ({control['verdict']}{chance})"
    return (
        f"{what}, is missed by the same scan ({control['verdict']}{chance}): a clean verdict says "
        "little; search for longer, or compare with more references"
    )


def control_tone(control: Mapping[str, Any]) -> str:
    """Return the tone of that line."""
    if not control["planted"]:
        return "neutral"
    return "good" if control["found"] else "warn"


def is_flagged(scan: Mapping[str, Any], index: int) -> bool:
    """Return whether class `index` of a scan is the one that its verdict points at."""
    names: Sequence[str] = scan.get("class_names") or []
    return (
        scan.get("verdict") in ("backdoored", "suspicious")
        and index < len(names)
        and names[index] == scan.get("target")
    )


def any_given(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Return whether any row has a value for that key."""
    return any(row.get(key) is not None for row in rows)
