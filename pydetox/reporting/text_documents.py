"""Results on text models as plain data, with the keys of image scans where they mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..detect.statistics import FINDINGS
from ..text.search import FoundTrigger
from ..text.verdict import TextScanResult


def text_scan_document(scan: TextScanResult) -> dict[str, Any]:
    """Return what a scan of a text model found."""
    found, names = scan.detection, scan.class_names
    return {
        "kind": "text",
        "name": scan.name,
        "sha256": scan.sha256,
        "objective": "targeted",
        "verdict": found.verdict.value,
        "reason": found.reason,
        "p_l1": None,
        "score": found.score,
        "p_value": found.p_value,
        "target": scan.target_name if found.verdict in FINDINGS else None,
        "targets": [names[c] for c in scan.targets()],
        "cleared": [names[c] for c in found.cleared],
        "weakest_class": scan.target_name,
        "class_names": list(names),
        "class_scores": list(found.class_scores),
        "class_effort": list(found.effort),
        "words": [
            {**words_row(one), "class": names[c], "length": length}
            for c, row in enumerate(scan.search.found)
            for length, one in enumerate(row, 1)
        ],
        "accuracy": scan.accuracy,
        "distance": scan.distance,
        "text_passes": scan.search.passes,
        "calibration": None if scan.calibration is None else scan.calibration.to_dict(),
        "seconds": scan.seconds,
        "family": f"{scan.length}-token",
        "other_families": [
            {
                "family": f"{length}-token",
                "verdict": one.verdict.value,
                "score": one.score,
                "p_value": one.p_value,
                "class_effort": list(one.effort),
                "class_scores": list(one.class_scores),
            }
            for length, one in sorted(scan.others.items())
        ],
        "warnings": list(scan.warnings),
    }


def words_row(found: FoundTrigger) -> dict[str, Any]:
    """Return a trigger with how well it works."""
    return {
        "text": found.trigger.text,
        "tokens": list(found.trigger.tokens),
        "place": found.trigger.place,
        "loss": found.loss,
        "success": found.success,
    }


def deciding_words(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the words of the most suspect class, of the length that decides; None without any.

    result: A `text_scan_document`.
    """
    if result.get("kind") != "text":
        return None
    length = int(str(result["family"]).partition("-")[0])
    for row in result.get("words", ()):
        if row["class"] == result.get("weakest_class") and row["length"] == length:
            return dict(row)
    return None
