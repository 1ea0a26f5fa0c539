"""The result of a run over many checkpoints: its JSON document, and the parts of a text report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .result import VERDICT_TONES, control_line, control_tone
from .text_documents import deciding_words

RUN_SCHEMA = "pydetox.scan/2"

#: In the order in which a person should look.
VERDICT_ORDER = ("backdoored", "suspicious", "error", "inconclusive", "skipped", "clean")

# More than that are counted instead of listed, if they are clean.
_LISTED = 20


def run_document(
    results: Sequence[Mapping[str, Any]],
    *,
    exit_code: int,
    seed: int,
    images: str,
    texts: str | None = None,
    calibration: Mapping[str, Any] | None,
    ignored: Iterable[Sequence[str]] = (),
    not_reached: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the JSON document of a run; docs/scanning.md describes it.

    results: `ScanRecord.to_dict()` of each target. ignored: what was no checkpoint: name and
    reason. not_reached: names of targets that an interrupted run has not come to.
    """
    return {
        "schema": RUN_SCHEMA,
        "exit_code": exit_code,
        "seed": seed,
        "images": images,
        **({} if texts is None else {"texts": texts}),
        "calibration": calibration,
        "counts": count(results),
        "not_reached": list(not_reached),
        "ignored": [{"name": name, "reason": reason} for name, reason in ignored],
        "results": list(results),
    }


def count(results: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many results have each verdict; all verdicts are there."""
    counts = dict.fromkeys(VERDICT_ORDER, 0)
    for result in results:
        counts[result["verdict"]] += 1
    return counts


def compared_with(document: Mapping[str, Any]) -> str:
    """Return in words what trigger sizes were compared with."""
    calibration = document["calibration"]
    if calibration is None:
        return "compared with nothing: no calibration"
    rungs = [calibration, *calibration.get("rungs", ())]
    if len(rungs) == 1:
        return "compared with " + ", ".join(calibration["models"])
    return (
        f"compared with {len(calibration['models'])} copies of the base at each of {len(rungs)} "
        "distances, each model with those of the two distances around its own"
    )


def count_cards(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the counts of a run as cards, without those that are zero."""
    cards = [
        {"label": verdict, "value": str(number), "tone": VERDICT_TONES[verdict]}
        for verdict, number in document["counts"].items()
        if number
    ]
    if document["not_reached"]:
        number = len(document["not_reached"])
        cards.append({"label": "not reached", "value": str(number), "tone": "warn"})
    return cards


def by_urgency(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return results in the order in which a person should look at them."""
    return sorted(results, key=lambda result: VERDICT_ORDER.index(result["verdict"]))


def explained(result: Mapping[str, Any]) -> str:
    """Return verdict and reason in one line."""
    verdict, reason = result["verdict"], result["reason"]
    if verdict in ("error", "skipped"):
        verdict = "not scanned"
    if result.get("duplicate_of"):
        reason = f"same content as {result['duplicate_of']}: {reason}"
    return f"{verdict}: {reason}"


def found_in_file(finding: Mapping[str, str]) -> str:
    """Return a finding about a file in one line."""
    return f"finding ({finding['rule']}): {finding['message']}"


def run_text(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a run as `pydetox.reporting.render_text` takes it."""
    results = document["results"]
    listed = results
    if len(results) > _LISTED:
        listed = [r for r in by_urgency(results) if r["verdict"] != "clean"]
    cards = [
        {
            "label": result["name"],
            "value": explained(result),
            "tone": VERDICT_TONES[result["verdict"]],
        }
        for result in listed
    ]
    cards += [
        {"label": result["name"], "value": found_in_file(finding), "tone": "warn"}
        for result in results
        for finding in result.get("findings", ())
    ]
    cards += [
        {
            "label": f"{result['name']}, positive control",
            "value": control_line(result["positive_control"]),
            "tone": control_tone(result["positive_control"]),
        }
        for result in listed
        if result.get("positive_control")
    ]
    counts = count_cards(document) if len(results) != 1 or document["not_reached"] else []
    return {
        "title": "pydetox scan",
        "subtitle": compared_with(document),
        "summary": [*counts, *cards],
        "scans": [r for r in results if "p_l1" in r],
        "words": [
            {**row, "name": result["name"]}
            for result in results
            if (row := deciding_words(result)) is not None
        ],
    }
