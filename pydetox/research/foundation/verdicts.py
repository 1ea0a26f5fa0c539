"""False alarms and detections with nothing but a base and images: no option, no knob.

Clean models are fine-tuned from one base at learning rates over two decades, so that some hardly
leave it and some move far. Backdoored ones are made at the same rates. Each is scanned as `pydetox
scan MODEL --base BASE --images IMAGES` scans it: beside copies of the base at the two distances
around its own. Models with the same distances share these copies.

Every model, every set of copies and every judged model is cached, each by what decides it. A run
that is stopped goes on where it was. Rates follow a sequence of low discrepancy, so that the models
that were judged by then cover both decades.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...api import scan
from ...data import ImageSet
from ...detect.calibrate import calibrate_references
from ...detect.configuration import ScanConfig
from ...detect.copies import OutOfReachError
from ...detect.distance import model_distance, rungs_around
from ...detect.scatter import contrasts
from ...detect.statistics import FINDINGS, Calibration, Verdict
from ...errors import DataError
from ...evaluation import evaluate, wilson_interval
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ..bench.cache import code_digest, data_digest, key_of
from .base import JointTraining
from .victims import FINE_TUNING, Victim, Workshop

#: What decides the sizes of references, besides their base, images and configuration.
_REFERENCE_CODE = (
    "inversion",
    "ops",
    "models",
    "training.py",
    "evaluation.py",
    "session.py",
    "detect/calibrate.py",
    "detect/copies.py",
    "detect/distance.py",
    "detect/search.py",
)

#: What decides a verdict, besides the model, its references and the configuration.
JUDGING_CODE = (*_REFERENCE_CODE, "detect", "api.py")

#: The golden ratio's fraction: its multiples are spread evenly over [0, 1), wherever they end.
_GOLDEN = (math.sqrt(5) - 1) / 2


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
        seeds: The seeds of the bases and their tasks; those below 10 were developed on. Every base
            has all of the following models.
        tower: The architecture of all models, as open_clip's ``model_cfg``.
        base_tasks: The tasks that the base is trained on.
        tasks: The tasks of these that models are fine-tuned on, in turns.
        clean: The number of clean models. More of them leave the first ones as they are.
        backdoored: The number of models of each attack.
        attacks: Some of `victims.ATTACKS`.
        rates: The smallest and the largest learning rate. Those of models are spread evenly
            between them on a logarithmic scale.
        epochs: The epochs of every fine-tuning.
        training: The training of the base.
        least_planted: A backdoored model counts if its ASR is at least this.
        scan: The configuration of every scan. What is reported is that of `ScanConfig()`.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    seeds: tuple[int, ...] = (10,)
    tower: dict[str, Any] = field(default_factory=lambda: SMALL_CLIP)
    base_tasks: tuple[str, ...] = ("fashion", "digits")
    tasks: tuple[str, ...] = ("fashion",)
    clean: int = 40
    backdoored: int = 8
    attacks: tuple[str, ...] = ("badnets", "blended", "sig")
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


def run_verdicts(
    plan: VerdictPlan, log: Callable[[str], None] = lambda _: None, *, minutes: float = math.inf
) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed; return "rows", "rungs" and "summary".

    minutes: No model is begun after this time. What was judged by then is returned. "rungs" tells
    how the sizes of references depend on their distance (see `rung_rows`).
    """
    end = time.monotonic() + 60 * minutes
    rows, rungs = list[dict[str, Any]](), list[dict[str, Any]]()
    for seed in plan.seeds:
        shop = Workshop(
            seed,
            training=plan.training,
            tower=plan.tower,
            names=plan.base_tasks,
            device=plan.device,
        )
        sets = dict[tuple[str, float], dict[str, Any]]()
        for victim, rate in drawn_models(plan):
            if time.monotonic() >= end:
                log(f"stopped after {minutes:g} minutes; the same command goes on")
                break
            row = _judged(plan, shop, victim, rate, sets, log)
            rows.append(row)
            known = "" if row["asr"] is None else f", ASR {row['asr']:.0%}"
            log(
                f"{len(rows)}. {row['name']}, rate {rate:.1e}{known}, distance "
                f"{row['distance']:.4f}: {row['verdict']} (p = {row['p_value']}), "
                f"{row['seconds']:.0f} s"
            )
        for task in plan.tasks:
            of_task = {
                rung: one["calibration"] for (name, rung), one in sets.items() if name == task
            }
            made = [Calibration.from_dict(of_task[r]) for r in sorted(of_task) if of_task[r]]
            if made:
                rungs += [{"seed": seed, "task": task, **row} for row in rung_rows(made)]
    return {"rows": rows, "rungs": rungs, "summary": summarize_verdicts(rows)}


def rung_rows(calibrations: Sequence[Calibration]) -> list[dict[str, Any]]:
    """Return how the log sizes of references depend on their distance.

    calibrations: One for each distance, ascending. A row has the family, the distance, the
    deviation of the contrasts within the references (root mean square over the classes), and the
    largest and the root mean square change of a class effect to the next distance: of the mean log
    size, relative to the mean of all classes. Those of the last distance are None.
    """
    rows = []
    for family in [one.family for one in (calibrations[0], *calibrations[0].others)]:
        chosen = [one.of(family) for one in calibrations]
        logs = [np.log(np.minimum(one.p_l1, 1.0)) for one in chosen]
        effects = [values.mean(axis=0) - values.mean() for values in logs]
        for k, one in enumerate(chosen):
            squares = contrasts(logs[k]).var(axis=0, ddof=1)
            change = effects[k + 1] - effects[k] if k + 1 < len(chosen) else None
            rows.append(
                {
                    "family": family,
                    "distance": one.distance,
                    "deviation": float(np.sqrt(squares.mean())),
                    "largest_change": None if change is None else float(np.abs(change).max()),
                    "change": None if change is None else float(np.sqrt((change**2).mean())),
                }
            )
    return rows


def summarize_verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return flat figures: default.fpr, default.tpr, their counts and intervals, and times.

    A clean model is a false alarm if it is backdoored or suspicious. `inconclusive` is neither a
    false alarm nor a detection; its share among clean models is default.inconclusive.
    default.seconds is the mean time of a scan, default.reference_seconds that of the references of
    one model, which others share.
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
    """Return that many learning rates in [low, high), spread evenly on a logarithmic scale.

    Those of a smaller number are the first ones of a larger number.
    """
    low, high = map(math.log, plan.rates)
    return [math.exp(low + (high - low) * ((k + 1) * _GOLDEN % 1)) for k in range(count)]


def drawn_models(plan: VerdictPlan) -> list[tuple[Victim, float]]:
    """Return the models of each seed with their learning rates; clean and backdoored take turns."""
    found = list[tuple[float, Victim, float]]()
    for attack, count in [(None, plan.clean), *((a, plan.backdoored) for a in plan.attacks)]:
        for k, rate in enumerate(learning_rates(plan, count)):
            victim = Victim(1_000 + k, attack, plan.tasks[k % len(plan.tasks)])
            # Digits are too few images to poison.
            if attack is None or victim.task != "digits":
                found.append(((k + 0.5) / count, victim, rate))
    return [(victim, rate) for _, victim, rate in sorted(found, key=lambda one: one[0])]


def _judged(
    plan: VerdictPlan,
    shop: Workshop,
    victim: Victim,
    rate: float,
    known: dict[tuple[str, float], dict[str, Any]],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Return the row of a model; the model, its references and the row come from the cache.

    known: The references of this base by task and distance; those of this model are added.
    """
    # Base and tasks are shared with the workshop of the other rates.
    at_rate = copy.copy(shop)
    at_rate.fine_tuning = replace(FINE_TUNING, epochs=plan.epochs, learning_rate=rate)
    model = at_rate.model(victim)
    distance = model_distance(shop.base, model)
    sets = []
    for rung in rungs_around(distance) or ():
        place = victim.task, rung
        if place not in known:
            task = shop.tasks[victim.task]
            images, templates = task.splits.defender, task.templates
            known[place] = references_at(shop, plan.scan, images, templates, rung, log)
        if known[place]["calibration"] is not None:
            sets.append(known[place])
    content = {
        "scan": plan.scan,
        "code": code_digest(JUDGING_CODE),
        "model": at_rate.key(victim),
        "references": [one["key"] for one in sets],
    }
    key = key_of("verdict", content)
    row: dict[str, Any] | None = shop.cache.document(key)
    if row is None:
        calibration = None
        if sets:
            first, *others = (Calibration.from_dict(one["calibration"]) for one in sets)
            calibration = first.with_rungs(others)
        row = _row(plan, shop, victim, model, calibration)
        row |= {"rate": rate, "distance": distance}
        row = shop.cache.keep_document(key, row)
    assert row is not None
    return {**row, "reference_seconds": sum(one["seconds"] for one in sets)}


def references_at(
    shop: Workshop,
    scan: ScanConfig,
    images: ImageSet,
    templates: Sequence[str],
    rung: float,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Return a base's references at a distance: "key", "seconds" and "calibration", None without.

    scan: How they are searched. images: Those of the defender.
    """
    content = {
        # The levels of p and the rule that drops classes change no size of a reference.
        "scan": replace(scan, p_backdoored=0.01, p_suspicious=0.05, drop_below=None),
        "code": code_digest(_REFERENCE_CODE),
        "base": shop.base_key,
        "images": data_digest(images),
        "templates": templates,
        "rung": rung,
    }
    key = key_of("verdict-references", content)
    found: dict[str, Any] | None = shop.cache.document(key)
    if found is None:
        start, calibration = time.perf_counter(), None
        try:
            made = calibrate_references(
                shop.base,
                images,
                references=None,
                templates=templates,
                config=replace(scan, contrast=False),
                distance=rung,
            )
            calibration = made.to_dict()
        except OutOfReachError as error:
            log(str(error))
        seconds = time.perf_counter() - start
        log(f"references at {rung:g}, {seconds:.0f} s")
        document = {"key": key, "calibration": calibration, "seconds": seconds}
        found = shop.cache.keep_document(key, document)
    assert found is not None
    return found


def _row(
    plan: VerdictPlan,
    shop: Workshop,
    victim: Victim,
    model: OpenClipModel,
    calibration: Calibration | None,
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
        # Without references in reach, the scan says so.
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
        "ca": evaluation.clean_accuracy,
        "asr": asr,
        "counts": asr is None or asr >= plan.least_planted,
        "verdict": found.verdict.value,
        "reason": found.detection.reason,
        "p_value": found.detection.p_value,
        "target_right": planted is not None and found.target == planted.target,
        "target": None if planted is None else planted.target,
        "sizes": {
            family: {"p_l1": detection.p_l1, "scores": detection.class_scores}
            for family, detection in [
                (found.family, found.detection),
                *((one.family, one.detection) for one in found.others),
            ]
        },
        "seconds": found.seconds,
    }
