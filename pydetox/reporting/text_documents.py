"""Results on text models as plain data, with the keys of image scans where they mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..detect.statistics import FINDINGS
from ..text.causal.detox import CausalDetoxResult
from ..text.causal.verdict import CausalScanResult
from ..text.configuration import TextScanConfig
from ..text.detox import TextDetoxResult
from ..text.references import family_of, loss_of
from ..text.search import FoundTrigger
from ..text.towers.verdict import TowerScanResult
from ..text.verdict import TextScanResult
from .documents import evaluation_row


def text_scan_document(scan: TextScanResult) -> dict[str, Any]:
    """Return what a scan of a text model found."""
    found, names = scan.detection, scan.class_names
    return {
        "kind": "text",
        "name": scan.name,
        "sha256": scan.sha256,
        "objective": _objective(scan),
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
        **_continuations(scan),
    }


def _objective(scan: TextScanResult) -> str:
    """Return what was searched for: words into a class, a text, or words that collapse a tower."""
    if isinstance(scan, CausalScanResult):
        return "continuation"
    return "label-free" if isinstance(scan, TowerScanResult) else "targeted"


def _continuations(scan: TextScanResult) -> dict[str, Any]:
    """Return what only scans of causal models have."""
    if not isinstance(scan, CausalScanResult):
        return {}
    return {
        "continuations": [
            {
                "text": one.text,
                "tokens": list(one.tokens),
                "sureness": one.sureness,
                "gain": one.gain,
            }
            for one in scan.continuations
        ],
        "perplexity": scan.perplexity,
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


def word_scan_row(scan: TextScanResult, name: str, config: TextScanConfig) -> dict[str, Any]:
    """Return a scan as `reporting.words.words_section` takes it, for the length that decides.

    config: How it was scanned.
    """
    best = [row[scan.length - 1] for row in scan.search.found]
    references = None
    if scan.calibration is not None and not isinstance(scan, CausalScanResult | TowerScanResult):
        rows = scan.calibration.of(family_of(scan.length)).p_l1
        references = [
            sum(loss_of(row[c], config) for row in rows) / len(rows) for c in range(len(best))
        ]
    return {
        "name": name,
        "verdict": scan.verdict.value,
        "target": scan.target_name,
        "class_names": list(scan.class_names),
        "class_loss": [one.loss for one in best],
        "reference_loss": references,
        "words": [one.trigger.text for one in best],
        "success": [one.success for one in best],
    }


def text_detox_document(result: TextDetoxResult) -> dict[str, Any]:
    """Return the whole story of a repair of a text model."""
    names = result.before.class_names
    return {
        "verdict": result.verdict.value,
        "repaired": result.repaired,
        "scans": [
            text_scan_document(one) for one in (result.before, result.after) if one is not None
        ],
        "rounds": [
            {
                "targets": list(one.targets),
                "target_names": list(one.names) or [names[c] for c in one.targets],
                "words": [words_row(found) for found in one.triggers],
                "words_beside": list(one.beside),
                "alpha": one.search.coefficient,
                "limits_reached": one.search.reached,
                "vector_norm": one.vector.norm(),
                "alpha_search": {
                    "alpha": list(one.search.coefficients),
                    "ca": list(one.search.clean_accuracy),
                    "asr": list(one.search.attack_success_rate),
                    "pareto": [one.search.coefficients[k] for k in one.search.pareto_front()],
                    "asr_kind": "recovered" if one.triggers else "known",
                    "chosen": one.search.coefficient,
                },
            }
            for one in result.passes
        ],
        "evaluation": [
            evaluation_row(one, name)
            for one, name in (
                (result.evaluation_before, "before"),
                (result.evaluation_after, "after"),
            )
            if one is not None
        ],
        **_perplexities(result),
        "path": None if result.path is None else str(result.path),
        "seconds": dict(result.seconds),
    }


def _perplexities(result: TextDetoxResult) -> dict[str, Any]:
    """Return what only repairs of causal models have."""
    if not isinstance(result, CausalDetoxResult):
        return {}
    return {
        "perplexity": {
            when: asdict(one)
            for when, one in (
                ("before", result.perplexity_before),
                ("after", result.perplexity_after),
            )
            if one is not None
        }
    }
