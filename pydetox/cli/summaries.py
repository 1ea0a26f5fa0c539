"""Results as the parts of a report: for the terminal and for the HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..reporting.result import VERDICT_TONES, control_line
from ..reporting.values import number, percent


def card(label: str, value: str, verdict: str = "") -> dict[str, str]:
    """Return one line of a report's summary, in the colour of a verdict."""
    return {"label": label, "value": value, "tone": VERDICT_TONES.get(verdict, "neutral")}


def left_of_triggers(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what to say of a repair whose re-scan is clean, but whose triggers still work.

    result: The JSON document of `pydetox unlearn`.
    """
    clean = len(result["scans"]) > 1 and result["scans"][-1]["verdict"] == "clean"
    if not clean or not result["rounds"] or result["rounds"][-1]["limits_reached"]:
        return []
    left = result["rounds"][-1]["alpha_search"]
    asr = left["asr"][left["alpha"].index(left["chosen"])]
    return [
        card(
            "left of the triggers",
            f"the strongest one still succeeds in {percent(asr)}, although the re-scan is clean; "
            "if that is too much, try more --passes, or other limits",
            "suspicious",
        )
    ]


def unlearn_report(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of `pydetox unlearn`. result: its JSON document."""
    scans = [dict(scan) for scan in result["scans"]]
    for scan, name in zip(scans, ("before", "after"), strict=False):
        scan["name"] = f"{scan['name']}, {name}"
    summary = [
        card(scan["name"], f"{scan['verdict']}: {scan['reason']}", scan["verdict"])
        for scan in scans
    ]
    summary += [
        card(f"{scan['name']}, positive control", control_line(scan["positive_control"]))
        for scan in scans
        if scan["positive_control"]
    ]
    for place, one in enumerate(result["rounds"], start=1):
        reached = "" if one["limits_reached"] else "; no α keeps all limits"
        classes = "class" if len(one["targets"]) == 1 else "classes"
        target = f"target {classes} {', '.join(one['target_names'])}"
        if not one["targets"]:
            target = "triggers that send all images into one direction"
        if one["alpha"] == 0:
            reached += "; nothing subtracted"
        for kind in ("warps", "waves"):
            if one.get(kind):
                reached += f"; of its triggers {one[kind]} are {kind}"
        summary.append(
            card(
                f"trigger vector {place}",
                f"{target}, α = {one['alpha']:g}{reached}",
                "" if one["limits_reached"] else "suspicious",
            )
        )
        if offer := one["compromise"]:
            summary.append(
                card(
                    "a compromise",
                    f"α = {offer['alpha']:g} removes these triggers "
                    f"(recovered ASR {percent(offer['asr'])}) and keeps "
                    f"{percent(offer['ca_kept'])} of CA: "
                    f"--min-accuracy-kept {offer['min_accuracy_kept']:g} "
                    f"--max-drift {offer['max_drift']:g} allows it",
                )
            )
    summary += left_of_triggers(result)
    moved = result["drift"]
    if moved is not None:
        summary.append(
            card(
                "feature drift",
                f"{number(moved['mean_distance'])} on images outside the named classes; "
                f"{percent(moved['changed_neighbours'])} of them have another nearest neighbour",
            )
        )
    path = result["path"]
    summary.append(card("repaired checkpoint", path or "not written: nothing was subtracted"))
    if adapter := result["adapter"]:
        summary.append(
            card(
                "LoRA adapter",
                f"rank {adapter['rank']} leaves out {percent(adapter['error'])} of the change; "
                f"image features differ by {number(adapter['feature_distance'])} from those of the "
                "model that was scanned again",
            )
        )
    rounds = result["rounds"]
    return {
        "title": "pydetox unlearn",
        "subtitle": result["name"],
        "summary": summary,
        "scans": scans,
        # What kept the limits needs no closer look.
        "alpha_search": next(
            (one["alpha_search"] for one in rounds if not one["limits_reached"]),
            rounds[0]["alpha_search"] if rounds else None,
        ),
        "evaluation": result["evaluation"],
        "seconds": result["seconds"],
        "provenance": {"sha256 of the source": result["sha256"], "seed": result["seed"]},
    }
