"""Saving a repaired model, with a record of how it was made."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from ..checkpoints import Provenance, save_checkpoint
from ..detect.configuration import ScanConfig
from ..detect.result import ScanResult
from ..evaluation import Evaluation
from .configuration import UnlearnConfig
from .result import DetoxResult


def save_repaired(
    result: DetoxResult,
    output: str | Path,
    *,
    overwrite: bool,
    trigger: str,
    config: ScanConfig,
    unlearning: UnlearnConfig,
) -> Path:
    """Write the repaired model in the layout that it came in and return its folder.

    result: A result in which something was subtracted. trigger: "known trigger" or "unknown
    trigger", for the description of the method. Raises OutputError if the folder cannot be written.
    """
    after = result.before if result.after is None else result.after
    coefficients = [one.search.coefficient for one in result.rounds]
    model = result.model
    moved = result.drift
    return save_checkpoint(
        output,
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=model.preprocess_config or None,
        companions=model.companions,
        provenance=Provenance(
            method=f"TBAR, {trigger}, {unlearning.vector} vector",
            source_name=result.before.name,
            source_sha256=result.before.sha256,
            scaling_coefficient=coefficients[-1],
            seeds={"scan": config.seed, "unlearn": unlearning.seed},
            before=_metrics(result.evaluation_before, result.before),
            after=_metrics(result.evaluation_after, after),
            extra={
                "scaling_coefficients": coefficients,
                "target_classes": [list(one.targets) for one in result.rounds],
                "verdict_before": result.before.verdict.value,
                "verdict_after": after.verdict.value,
                "feature_drift": None if moved is None else asdict(moved),
            },
        ),
        overwrite=overwrite,
    )


def _metrics(evaluation: Evaluation | None, scan: ScanResult) -> dict[str, float]:
    values = {"p_l1": scan.detection.smallest_p_l1}
    if evaluation is not None:
        values["clean_accuracy"] = evaluation.clean_accuracy
        if evaluation.attack_success_rate is not None:
            values["attack_success_rate"] = evaluation.attack_success_rate
    # A search that found nothing has an infinite size, which JSON cannot represent.
    return {name: value for name, value in values.items() if math.isfinite(value)}
