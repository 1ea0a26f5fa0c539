"""Saving a repaired model, with a record of how it was made."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..checkpoints import Provenance, save_checkpoint
from ..checkpoints.adapter_writing import make_adapter, save_adapter
from ..checkpoints.adapters import merge_adapter
from ..checkpoints.layout import TRANSFORMERS_CONFIG_NAME
from ..checkpoints.transformers_layouts import from_transformers, to_transformers
from ..detect.configuration import ScanConfig
from ..detect.result import ScanResult
from ..errors import OutputError
from ..evaluation import Evaluation
from ..models import OpenClipModel
from .configuration import UnlearnConfig
from .result import DetoxResult, WrittenAdapter

_IMAGES_AT_ONCE = 64


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
    model = result.model
    return save_checkpoint(
        output,
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=model.preprocess_config or None,
        companions=model.companions,
        provenance=_provenance(result, trigger, config, unlearning),
        overwrite=overwrite,
    )


def save_repair_adapter(
    result: DetoxResult,
    source: OpenClipModel,
    images: Tensor,
    output: str | Path,
    *,
    rank: int,
    overwrite: bool,
    trigger: str,
    config: ScanConfig,
    unlearning: UnlearnConfig,
) -> tuple[Path, WrittenAdapter]:
    """Write the change of a repair as a LoRA adapter; return its folder and what it leaves out.

    source: The model before the repair. images: uint8 [N, 3, H, W]. The other arguments are those
    of `save_repaired`. Raises what `adapter_obstacle` says as an OutputError, or OutputError if the
    folder cannot be written.
    """
    obstacle = adapter_obstacle(source)
    if obstacle is not None:
        raise OutputError(f"{source.name}: {obstacle}")
    before, after = (
        to_transformers(model.storage_state_dict(), model.model_config)
        for model in (source, result.model)
    )
    made = make_adapter(before, after, rank=rank)
    path = save_adapter(
        output,
        made,
        base=result.before.name,
        provenance=_provenance(result, trigger, config, unlearning),
        overwrite=overwrite,
    )
    merged = result.model.clone()
    weights = from_transformers(merge_adapter(made.tensors, before, 1.0), source.model_config)
    merged.clip.load_state_dict({k: v.float() for k, v in weights.items()})
    distances = []
    with torch.no_grad():
        for part in torch.split(images, _IMAGES_AT_ONCE):
            first, second = (m.encode_pixels(m.pixels(part)) for m in (merged, result.model))
            distances.append(1 - cosine_similarity(first, second, dim=1))
    return path, WrittenAdapter(rank, made.error, float(torch.cat(distances).mean()))


def adapter_obstacle(model: OpenClipModel) -> str | None:
    """Return the reason why no adapter of peft fits a model; None if one does."""
    if TRANSFORMERS_CONFIG_NAME in model.companions:
        return None
    return (
        "a LoRA adapter is loaded onto a model of transformers, and this is none; expected a "
        "folder with a config.json"
    )


def _provenance(
    result: DetoxResult, trigger: str, config: ScanConfig, unlearning: UnlearnConfig
) -> Provenance:
    after = result.before if result.after is None else result.after
    coefficients = [one.search.coefficient for one in result.rounds]
    moved = result.drift
    return Provenance(
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
    )


def _metrics(evaluation: Evaluation | None, scan: ScanResult) -> dict[str, float]:
    values = {"p_l1": scan.detection.smallest_p_l1}
    if evaluation is not None:
        values["clean_accuracy"] = evaluation.clean_accuracy
        if evaluation.attack_success_rate is not None:
            values["attack_success_rate"] = evaluation.attack_success_rate
    # A search that found nothing has an infinite size, which JSON cannot represent.
    return {name: value for name, value in values.items() if math.isfinite(value)}
