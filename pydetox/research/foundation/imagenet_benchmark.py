"""The benchmark of a pretrained tower (see `imagenet`): references, scans, repairs and figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...api import calibrate, detox, scan
from ...detect.distance import model_distance
from ...detect.statistics import FINDINGS, Calibration
from ...evaluation import evaluate
from ...models import OpenClipModel
from ..bench.cache import code_digest, key_of
from .imagenet import TEMPLATES, ImagenetLab, ImagenetPlan
from .verdicts import JUDGING_CODE


def run_imagenet(plan: ImagenetPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed; return "rows" and "summary"."""
    lab = ImagenetLab(plan, log=log)
    suspects = [("backdoored", 0), *(("clean", k) for k in range(plan.clean))]
    rows: list[dict[str, Any]] = []
    for kind, number in suspects:
        model = lab.model(kind, number)
        row = {
            "kind": kind,
            "number": number,
            "distance": model_distance(lab.base, model),
            **_measured(lab, model, "before"),
        }
        log(f"{model.name}: {_shares(row, 'before')}, distance {row['distance']:.2g}")
        rows.append(row)
    key, calibration = _references(lab, suspects)
    for row, (kind, number) in zip(rows, suspects, strict=True):
        model = lab.model(kind, number)
        row |= _judged(lab, model, kind, number, key, calibration)
        log(f"{model.name}: {row['verdict']} (p = {row['p_value']}), {_shares(row, 'after')}")
    return {"rows": rows, "summary": summarize_imagenet(rows)}


def summarize_imagenet(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return flat figures.

    imagenet.target_right: The share of backdoored models that are a finding with the right class.
    asr_before, asr: The share of stamped test images that go to the target, without those that
    belong there. agreement_before, agreement: The share of clean test images on which a model
    answers as the clean one, before and after the repair. fpr: The share of clean suspects that are
    a finding. Without a repair, a model stays as it is.
    """
    planted = [row for row in rows if row["kind"] == "backdoored"]
    clean = [row for row in rows if row["kind"] == "clean"]
    findings = [one.value for one in FINDINGS]
    figures: dict[str, Any] = {}
    if planted:
        figures["target_right"] = _mean([row["target_right"] for row in planted])
        for name in ("asr", "agreement"):
            figures[f"{name}_before"] = _mean([row[f"{name}_before"] for row in planted])
            figures[name] = _mean([row[f"{name}_after"] for row in planted])
        figures["repaired"] = _mean([row["rescan"] == "clean" for row in planted])
        figures["seconds"] = _mean([row["seconds"] for row in planted])
    if clean:
        figures["fpr"] = _mean([row["verdict"] in findings for row in clean])
    return {f"imagenet.{name}": value for name, value in figures.items()}


def _references(lab: ImagenetLab, suspects: Sequence[tuple[str, int]]) -> tuple[str, Calibration]:
    """Return the calibration that all suspects share, and its name in the cache."""
    config = lab.plan.scan
    images = replace(lab.images["defender"], labels=None)
    content = {
        "models": [lab.key(kind, number) for kind, number in suspects],
        "images": images.digest,
        "scan": config,
        "code": code_digest((*JUDGING_CODE, "repair")),
    }
    key = key_of("imagenet-references", content)
    kept = lab.cache.document(key)
    if kept is None:
        models = [lab.model(kind, number) for kind, number in suspects]
        start = time.perf_counter()
        made = calibrate(lab.base, images, suspects=models, templates=TEMPLATES, config=config)
        lab.log(f"references: {time.perf_counter() - start:.0f} s")
        kept = lab.cache.keep_document(key, {"calibration": made.to_dict()})
    return key, Calibration.from_dict(kept["calibration"])


def _judged(
    lab: ImagenetLab,
    model: OpenClipModel,
    kind: str,
    number: int,
    references: str,
    calibration: Calibration,
) -> dict[str, Any]:
    plan, log = lab.plan, lab.log
    images = replace(lab.images["defender"], labels=None)
    content = {"model": lab.key(kind, number), "references": references, "repair": plan.repair}
    key = key_of("imagenet-row", content)
    row: dict[str, Any] | None = lab.cache.document(key)
    if row is not None:
        return row
    start = time.perf_counter()
    if kind == "clean":
        found = scan(
            model,
            images,
            base=lab.base,
            calibration=calibration,
            templates=TEMPLATES,
            config=plan.scan,
        )
        row = _measured(lab, model, "after")
    else:
        result = detox(
            model,
            images,
            base=lab.base,
            calibration=calibration,
            templates=TEMPLATES,
            config=plan.scan,
            unlearning=plan.repair,
        )
        found = result.before
        parts = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
        log(f"{model.name}: {parts}; {found.tower_passes:,} passes of the scan")
        row = {
            **_measured(lab, result.model, "after"),
            "rescan": None if result.after is None else result.after.verdict.value,
            "rounds": len(result.rounds),
            "drift": None if result.drift is None else result.drift.mean_distance,
            "target_right": found.verdict in FINDINGS and lab.backdoor.target in found.targets(),
        }
    row |= {
        "verdict": found.verdict.value,
        "reason": found.detection.reason,
        "p_value": found.detection.p_value,
        "weakest": found.target_name,
        "passes": found.tower_passes,
        "seconds": time.perf_counter() - start,
    }
    return dict(lab.cache.keep_document(key, row))


def _measured(lab: ImagenetLab, model: OpenClipModel, when: str) -> dict[str, Any]:
    """Return agreement with the clean model, and ASR, on test images."""
    planted = lab.backdoor
    found = evaluate(
        model, lab.images["test"], lab.head, trigger=planted.trigger, target=planted.target
    )
    return {f"agreement_{when}": found.clean_accuracy, f"asr_{when}": found.attack_success_rate}


def _shares(row: Mapping[str, Any], when: str) -> str:
    return f"agreement {row[f'agreement_{when}']:.1%}, ASR {row[f'asr_{when}']:.1%}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
