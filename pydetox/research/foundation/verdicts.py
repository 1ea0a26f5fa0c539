"""False alarms and detections with nothing but a base and images: no option, no knob.

Clean models are fine-tuned from one base at learning rates over two decades, so that some hardly
leave it and some move far. Backdoored ones are made at the same rates. Each is scanned as `pydetox
scan MODEL --base BASE --images IMAGES` scans it, all of one base and task sharing references.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...api import calibrate, scan
from ...detect.configuration import ScanConfig
from ...detect.distance import model_distance
from ...detect.statistics import FINDINGS, Calibration, Verdict
from ...errors import DataError
from ...evaluation import evaluate, wilson_interval
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ..bench.cache import code_digest, key_of
from .base import JointTraining
from .victims import FINE_TUNING, Victim, Workshop

#: What decides a verdict, besides models and configuration.
_CODE = ("inversion", "ops", "detect", "session.py", "models", "training.py", "api.py", "rng.py")


#: Two blocks of 64 channels on 4 patches of 8 pixels: small enough for many models.
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}


@dataclass(frozen=True)
class VerdictPlan:
    """Everything that decides a run.

    Attributes:
        seed: The seed of the base and its tasks; those below 10 were developed on.
        tower: The architecture of all models, as open_clip's ``model_cfg``.
        base_tasks: The tasks that the base is trained on.
        tasks: The tasks of these that models are fine-tuned on, in turns.
        clean: The number of clean models. Their learning rates are evenly spaced on a logarithmic
            scale.
        backdoored: The number of models of each attack, at rates spaced likewise.
        attacks: Some of `victims.ATTACKS`.
        rates: The smallest and the largest learning rate.
        epochs: The epochs of every fine-tuning.
        training: The training of the base.
        least_planted: A backdoored model counts if its ASR is at least this.
        scan: The configuration of every scan. What is reported is that of `ScanConfig()`.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    seed: int = 10
    tower: dict[str, Any] = field(default_factory=lambda: SMALL_CLIP)
    base_tasks: tuple[str, ...] = ("fashion", "digits")
    tasks: tuple[str, ...] = ("fashion",)
    clean: int = 40
    backdoored: int = 5
    attacks: tuple[str, ...] = ("badnets", "blended")
    rates: tuple[float, float] = (1e-5, 1e-3)
    epochs: int = 4
    training: JointTraining = field(default_factory=lambda: JointTraining(steps=800))
    least_planted: float = 0.5
    scan: ScanConfig = field(default_factory=ScanConfig)
    device: str = "cpu"


def quick_verdict_plan() -> VerdictPlan:
    """Return a run of less than a minute that shows that everything works, not how well."""
    return VerdictPlan(
        base_tasks=("digits",),
        tasks=("digits",),
        clean=2,
        backdoored=0,
        rates=(1e-4, 1.5e-4),
        epochs=1,
        training=JointTraining(steps=40, per_task=16),
        scan=ScanConfig(inversion=InversionConfig(steps=20), families=("patch",), references=2),
    )


def run_verdicts(plan: VerdictPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed; return "rows" and "summary"."""
    shop = Workshop(
        plan.seed,
        training=plan.training,
        tower=plan.tower,
        names=plan.base_tasks,
        device=plan.device,
    )
    rows = list[dict[str, Any]]()
    for task in plan.tasks:
        rows += _of_task(plan, shop, task, log)
    return {"rows": rows, "summary": summarize_verdicts(rows)}


def summarize_verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return flat figures: default.fpr, default.tpr, their counts and intervals, and times.

    A clean model is a false alarm if it is backdoored or suspicious. `inconclusive` is neither a
    false alarm nor a detection; its share among clean models is default.inconclusive.
    default.seconds is the mean time of a scan, default.reference_seconds that of the references
    divided by the number of models that share them.
    """
    clean = [row for row in rows if row["attack"] is None]
    planted = [row for row in rows if row["attack"] is not None and row["counts"]]
    figures: dict[str, Any] = {}
    for name, some in (("fpr", clean), ("tpr", planted)):
        if not some:
            continue
        alarms = sum(row["verdict"] in [one.value for one in FINDINGS] for row in some)
        low, high = wilson_interval(alarms, len(some))
        figures |= {
            f"default.{name}": alarms / len(some),
            f"default.{name}_low": low,
            f"default.{name}_high": high,
            f"default.{name}_models": len(some),
        }
    for name, value, some in (
        ("inconclusive", Verdict.INCONCLUSIVE, clean),
        ("fpr_backdoored", Verdict.BACKDOORED, clean),
    ):
        if some:
            figures[f"default.{name}"] = sum(r["verdict"] == value.value for r in some) / len(some)
    if planted:
        right = sum(row["target_right"] for row in planted)
        figures["default.target_right"] = right / len(planted)
    if rows:
        figures["default.seconds"] = sum(row["seconds"] for row in rows) / len(rows)
        shared = sum(row["reference_seconds"] for row in rows) / len(rows)
        figures["default.reference_seconds"] = shared
    return figures


def learning_rates(plan: VerdictPlan, count: int) -> list[float]:
    """Return that many learning rates, evenly spaced on a logarithmic scale, in (low, high)."""
    low, high = map(math.log, plan.rates)
    return [math.exp(low + (high - low) * (k + 0.5) / count) for k in range(count)]


def drawn_models(plan: VerdictPlan, task: str) -> list[tuple[Victim, float]]:
    """Return the models of a task, each with its learning rate; the tasks take turns."""
    place, turns = plan.tasks.index(task), len(plan.tasks)
    found = []
    for attack, count in [(None, plan.clean), *((a, plan.backdoored) for a in plan.attacks)]:
        rates = learning_rates(plan, count) if count else []
        found += [
            (Victim(1_000 + k, attack, task), rate)
            for k, rate in enumerate(rates)
            if k % turns == place
        ]
    # Digits are too few images to poison.
    return [(v, rate) for v, rate in found if v.attack is None or v.task != "digits"]


def _of_task(
    plan: VerdictPlan, shop: Workshop, task: str, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    drawn = drawn_models(plan, task)
    images, templates = shop.tasks[task].splits.defender, shop.tasks[task].templates
    models, base = [], shop.base
    for victim, rate in drawn:
        # Base and tasks are shared with the workshop of the other rates.
        at_rate = copy.copy(shop)
        at_rate.fine_tuning = replace(FINE_TUNING, epochs=plan.epochs, learning_rate=rate)
        models.append((at_rate.model(victim), at_rate.key(victim)))
    common = {"scan": plan.scan, "code": code_digest(_CODE), "keys": [key for _, key in models]}
    key = key_of("verdict-calibration", {**common, "task": task})
    made = shop.cache.document(key)
    if made is None:
        start = time.perf_counter()
        calibration = calibrate(
            base,
            images,
            suspects=[model for model, _ in models],
            templates=templates,
            config=plan.scan,
        )
        seconds = time.perf_counter() - start
        made = shop.cache.keep_document(
            key, {"calibration": calibration.to_dict(), "seconds": seconds}
        )
    calibration = Calibration.from_dict(made["calibration"])
    rows = []
    for (victim, rate), (model, name) in zip(drawn, models, strict=True):
        key = key_of("verdict", {**common, "model": name})
        row = shop.cache.document(key)
        if row is None:
            row = _row(plan, shop, victim, model, calibration) | {"rate": rate}
            row = shop.cache.keep_document(key, row)
        rows.append({**row, "reference_seconds": made["seconds"] / len(drawn)})
        log(
            f"{row['name']}, rate {rate:.1e}, distance {row['distance']:.3f}: {row['verdict']} "
            f"(p = {row['p_value']}), {row['seconds']:.0f} s"
        )
    return rows


def _row(
    plan: VerdictPlan,
    shop: Workshop,
    victim: Victim,
    model: OpenClipModel,
    calibration: Calibration,
) -> dict[str, Any]:
    task = shop.tasks[victim.task]
    planted = shop.backdoor(victim) if victim.attack is not None else None
    evaluation = evaluate(
        model,
        task.splits.validation,
        model.zero_shot_head(task.class_names, task.templates),
        trigger=None if planted is None else planted.trigger,
        target=None if planted is None else planted.target,
    )
    found = scan(
        model,
        task.splits.defender,
        base=shop.base,
        calibration=calibration,
        templates=task.templates,
        config=plan.scan,
    )
    asr = evaluation.attack_success_rate
    if planted is not None and asr is None:
        raise DataError(f"{victim.name}: no images of other classes to attack")
    return {
        "name": victim.name,
        "attack": victim.attack,
        "task": victim.task,
        "distance": model_distance(shop.base, model),
        "ca": evaluation.clean_accuracy,
        "asr": asr,
        "counts": asr is None or asr >= plan.least_planted,
        "verdict": found.verdict.value,
        "reason": found.detection.reason,
        "p_value": found.detection.p_value,
        "target_right": planted is not None and found.target == planted.target,
        "seconds": found.seconds,
    }
