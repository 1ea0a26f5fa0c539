"""Results as plain data for JSON and reports: dict, list, str, numbers and None."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..analysis.localization import Localization
from ..detect.result import ScanResult
from ..detect.statistics import FINDINGS
from ..evaluation import Evaluation
from ..repair.alpha import CoefficientSearch
from ..repair.result import DetoxResult


def scan_document(scan: ScanResult) -> dict[str, Any]:
    """Return what a scan found; images are left out."""
    found, reference = scan.detection, scan.calibration
    names = list(scan.class_names or [])
    if scan.objective != "targeted":
        names = ["any class"]
    return {
        "name": scan.name,
        "sha256": scan.sha256,
        "objective": scan.objective,
        "verdict": found.verdict.value,
        "reason": found.reason,
        "p_l1": found.smallest_p_l1,
        "score": found.score,
        "threshold": found.threshold,
        "p_value": found.p_value,
        "anomaly_index": found.anomaly_index,
        "target": scan.target_name if found.verdict in FINDINGS else None,
        "targets": [(scan.class_names or names)[c] for c in scan.targets()],
        "cleared": [names[c] for c in found.cleared],
        "weakest_class": scan.target_name,
        "class_names": names,
        "class_p_l1": list(found.p_l1),
        "class_scores": list(found.class_scores),
        "class_dropped": list(found.dropped),
        "class_effort": list(found.effort),
        "class_steps": scan.class_steps(),
        "tower_passes": scan.tower_passes,
        "reference_p_l1": scan.reference_sizes(),
        "calibration": None if reference is None else reference.to_dict(),
        "tower": scan.inversion.tower,
        "seconds": scan.seconds,
        "family": scan.family,
        "other_families": [
            {
                "family": one.family,
                "verdict": one.detection.verdict.value,
                "p_l1": one.detection.smallest_p_l1,
                "score": one.detection.score,
                "p_value": one.detection.p_value,
                "class_p_l1": list(one.detection.p_l1),
                "class_scores": list(one.detection.class_scores),
            }
            for one in scan.others
        ],
        "warnings": list(scan.warnings),
        "positive_control": _control(scan),
    }


def _control(scan: ScanResult) -> dict[str, Any] | None:
    control = scan.control
    if control is None or scan.class_names is None:
        return None
    return {
        "target": scan.class_names[control.target],
        "p_l1": control.p_l1,
        "asr": control.success,
        "agreement": control.accuracy,
        "planted": control.planted,
        "found": control.found,
        "verdict": control.verdict,
        "p_value": control.p_value,
        "recovered_p_l1": control.recovered,
    }


def detox_document(result: DetoxResult) -> dict[str, Any]:
    """Return the whole story of a repair."""
    rows = [
        evaluation_row(evaluation, name)
        for name, evaluation in (
            ("before", result.evaluation_before),
            ("after", result.evaluation_after),
        )
        if evaluation is not None
    ]
    return {
        "verdict": result.verdict.value,
        "repaired": result.repaired,
        "scans": [scan_document(one) for one in (result.before, result.after) if one is not None],
        "rounds": [
            {
                "target": one.target,
                "targets": list(one.targets),
                "alpha": one.search.coefficient,
                "limits_reached": one.search.reached,
                "compromise": _compromise(one.search),
                "vector_norm": one.vector.norm(),
                "warps": sum(len(found.working()) for found in one.warps),
                "waves": sum(len(found.working()) for found in one.waves),
                "alpha_search": {
                    "alpha": list(one.search.coefficients),
                    "ca": list(one.search.clean_accuracy),
                    "asr": list(one.search.attack_success_rate),
                    "drift": list(one.search.drift),
                    "pareto": [one.search.coefficients[k] for k in one.search.pareto_front()],
                    "asr_kind": "recovered" if one.triggers else "known",
                    "chosen": one.search.coefficient,
                },
                "verdict": None if one.rescan is None else one.rescan.verdict.value,
            }
            for one in result.rounds
        ],
        "evaluation": rows,
        "drift": None if result.drift is None else asdict(result.drift),
        "path": None if result.path is None else str(result.path),
        "adapter": None if result.adapter is None else asdict(result.adapter),
        "seconds": dict(result.seconds),
    }


def _compromise(search: CoefficientSearch) -> dict[str, float] | None:
    found = search.compromise
    if found is None:
        return None
    return {
        "alpha": search.coefficients[found.index],
        "ca_kept": search.clean_accuracy[found.index] / search.accuracy_before,
        "asr": search.attack_success_rate[found.index],
        "min_accuracy_kept": found.min_accuracy_kept,
        "max_drift": found.max_drift,
    }


def evaluation_document(evaluation: Evaluation) -> dict[str, Any]:
    """Return all fields of an evaluation under their own names."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(evaluation).items()}


def evaluation_row(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """Return the row of a table of CA and ASR that shows an evaluation under `name`."""
    return {
        "name": name,
        "ca": evaluation.clean_accuracy,
        "ca_ci": list(evaluation.clean_accuracy_ci),
        "n_clean": evaluation.n_clean,
        "asr": evaluation.attack_success_rate,
        "asr_ci": evaluation.attack_success_rate_ci and list(evaluation.attack_success_rate_ci),
        "n_attack": evaluation.n_attack,
    }


def localization_document(found: Localization) -> dict[str, Any]:
    """Return all parts of a localisation under their own names."""
    return asdict(found)
