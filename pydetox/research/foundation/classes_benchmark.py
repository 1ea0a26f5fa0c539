"""Many classes: what screening costs, and whether it decides as the search of every class does.

Every suspect is scanned twice: with its classes screened, and with every class searched to the end,
which is the truth. Rates of false alarms come from the screening of all clean models, each judged
by references drawn from the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ...api import scan
from ...detect.calibrate import calibrate_references
from ...detect.configuration import ScanConfig
from ...detect.result import ScanResult
from ...detect.scatter import adjusted
from ...detect.screening import screen_classes
from ...detect.statistics import FINDINGS, Calibration, Verdict, detect
from ...evaluation import evaluate, wilson_interval
from ...models import OpenClipModel
from ...rng import generator
from ...session import Session
from .classes import ClassesLab, ClassesPlan


def run_classes(plan: ClassesPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed.

    Returns "plan", "rows" (one per suspect), "alarms" (p-values of clean models by references drawn
    from the others, per number of classes) and "summary".
    """
    rows, alarms = list[dict[str, Any]](), dict[str, list[float]]()
    for classes, seeds in zip(plan.classes, plan.seeds, strict=True):
        for seed in seeds:
            lab = ClassesLab(plan, classes, seed)
            log(f"{classes} classes, seed {seed}")
            suspects = [("clean", k) for k in range(plan.clean)]
            suspects += [(attack, k) for attack in plan.attacks for k in range(plan.victims)]
            for kind, number in suspects:
                row = _row(lab, kind, number)
                log(f"  {row['name']}: {_told(row)}")
                rows.append(row)
            alarms.setdefault(str(classes), []).extend(false_alarms(lab))
    document: dict[str, Any] = {"plan": asdict(plan), "rows": rows, "alarms": alarms}
    document["summary"] = summarize_classes(rows, alarms, plan)
    return document


def false_alarms(lab: ClassesLab) -> list[float]:
    """Return the p-values of clean models, each judged by sets of references among the others."""
    plan = lab.plan
    clean = [("reference", k) for k in range(plan.references)]
    clean += [("clean", k) for k in range(plan.clean)]
    efforts = np.array([_efforts(lab, kind, number) for kind, number in clean])
    return p_values_among(efforts, plan.references, plan.draws, lab.seed)


def p_values_among(efforts: Any, references: int, draws: int, seed: int) -> list[float]:
    """Return the p-values of clean models by references drawn from the others.

    efforts: [M, F, C] of M clean models, F families and C classes. references: Of each set. draws:
    The largest number of sets for each model.
    """
    rng = generator("foundation.alarms", seed)
    found = []
    for k in range(len(efforts)):
        others = [m for m in range(len(efforts)) if m != k]
        sets = list(itertools.combinations(others, references))
        for at in rng.permutation(len(sets))[:draws]:
            p_values = []
            for family in range(efforts.shape[1]):
                rows = tuple(tuple(efforts[m, family].tolist()) for m in sets[at])
                names = tuple(map(str, sets[at]))
                judged = detect(
                    efforts[k, family].tolist(),
                    Calibration(rows, "", names, screened=True),
                    has_classes=True,
                )
                p_values.append(1.0 if judged.p_value is None else judged.p_value)
            found.append(adjusted(min(p_values), efforts.shape[1]))
    return found


def summarize_classes(
    rows: Sequence[Mapping[str, Any]], alarms: Mapping[str, Sequence[float]], plan: ClassesPlan
) -> dict[str, Any]:
    """Return flat figures.

    classesN.work_share: passes of screened scans over those of complete ones, of N classes; where
    those were not run, over the passes of all their steps. reference_work_share: the same of the
    references.
    classes.same_verdict: share of suspects with the same verdict, and the same target where it is a
    finding, over all numbers of classes that were compared. classes.tpr: share of counted victims
    whose target was found by screening; tpr_full: by the complete search. classes.fpr: share of
    clean models, each judged by several sets of references, with p below p_suspicious.
    """
    figures: dict[str, Any] = {}
    counted = [r for r in rows if r["planted"] is None or r["planted"] >= plan.least_planted]
    compared = [r for r in counted if r["full"] is not None]
    for classes in plan.classes:
        of = [r for r in counted if r["classes"] == classes]
        if not of:
            continue
        every = [
            all_passes(plan.scan, classes) if r["full"] is None else r["full"]["passes"] for r in of
        ]
        screened = sum(r["screened"]["passes"] for r in of)
        figures[f"classes{classes}.work_share"] = screened / sum(every)
        figures[f"classes{classes}.reference_work_share"] = of[0]["screened"][
            "reference_passes"
        ] / (
            plan.references * all_passes(plan.scan, classes)
            if of[0]["full"] is None
            else of[0]["full"]["reference_passes"]
        )
    if compared:
        same = [_same(r) for r in compared]
        low, high = wilson_interval(sum(same), len(same))
        figures |= {
            "classes.models": len(same),
            "classes.same_verdict": sum(same) / len(same),
            "classes.same_verdict_low": low,
            "classes.same_verdict_high": high,
        }
    victims = [r for r in counted if r["target"] is not None]
    if victims:
        figures["classes.tpr"] = float(np.mean([_hit(r, "screened") for r in victims]))
        full = [_hit(r, "full") for r in victims if r["full"] is not None]
        if full:
            figures["classes.tpr_full"] = float(np.mean(full))
    every = [p for values in alarms.values() for p in values]
    if every:
        figures["classes.fpr"] = float(np.mean(np.array(every) < plan.scan.p_suspicious))
        figures["classes.fpr_backdoored"] = float(np.mean(np.array(every) < plan.scan.p_backdoored))
        figures["classes.fpr_judgements"] = len(every)
    return figures


def all_passes(config: ScanConfig, classes: int) -> int:
    """Return the passes of a search of every class for all its steps, with its last check."""
    search = config.inversion
    each = 2 * search.steps * search.batch_size + search.advanced.check_images
    return len(config.families) * classes * config.restarts * each


def _row(lab: ClassesLab, kind: str, number: int) -> dict[str, Any]:
    plan = lab.plan
    model = lab.model(kind, number)
    key = lab.key("classes-row", model.name, plan.scan)
    found = lab.cache.document(key)
    if found is not None:
        return dict(found)
    backdoor = None if kind == "clean" else lab.backdoor(kind, number)
    test = lab.task.splits.test
    if backdoor is None:
        measured = evaluate(model, test, lab.head)
    else:
        measured = evaluate(model, test, lab.head, trigger=backdoor.trigger, target=backdoor.target)
    compared = lab.classes in plan.compared
    row = {
        "name": model.name,
        "classes": lab.classes,
        "kind": kind,
        "target": None if backdoor is None else backdoor.target,
        "ca": measured.clean_accuracy,
        "planted": measured.attack_success_rate,
        "screened": _scanned(lab, model, plan.scan),
        "full": _scanned(lab, model, plan.scan.every_class()) if compared else None,
    }
    return dict(lab.cache.keep_document(key, row))


def _scanned(lab: ClassesLab, model: OpenClipModel, config: ScanConfig) -> dict[str, Any]:
    calibration, reference_passes = _calibration(lab, config)
    found = scan(
        model,
        lab.defender,
        calibration=calibration,
        templates=lab.task.templates,
        config=replace(config, contrast=False),
        description=f"{model.name}, {'screened' if calibration.screened else 'every class'}",
    )
    return {
        "verdict": found.verdict.value,
        "target": found.target if found.verdict in FINDINGS else None,
        "weakest": found.target,
        "family": found.family,
        "p_value": found.detection.p_value,
        "score": found.detection.score,
        "reason": found.detection.reason,
        "passes": found.tower_passes,
        "reference_passes": reference_passes,
        "seconds": found.seconds,
        "scores": _scores(found),
    }


def _scores(found: ScanResult) -> dict[str, list[float]]:
    every = [(found.family, found.detection), *((o.family, o.detection) for o in found.others)]
    return {family: list(one.class_scores) for family, one in every}


def _calibration(lab: ClassesLab, config: ScanConfig) -> tuple[Calibration, int]:
    key = lab.key("classes-calibration", "references", config)
    kept = lab.cache.document(key)
    if kept is None:
        references = [lab.model("reference", k) for k in range(lab.plan.references)]
        made = calibrate_references(
            None,
            lab.defender,
            references=references,
            templates=lab.task.templates,
            config=replace(config, contrast=False),
        )
        passes = sum(one.tower_passes for one in (made, *made.others))
        kept = lab.cache.keep_document(key, {"calibration": made.to_dict(), "passes": passes})
    return Calibration.from_dict(kept["calibration"]), int(kept["passes"])


def _efforts(lab: ClassesLab, kind: str, number: int) -> list[list[float]]:
    """Return the efforts of a clean model, [F, C]."""
    model, config = lab.model(kind, number), replace(lab.plan.scan, contrast=False)
    key = lab.key("classes-efforts", model.name, config)
    kept = lab.cache.document(key)
    if kept is None:
        session = Session.open(model, lab.defender, templates=lab.task.templates)
        kept = lab.cache.keep_document(
            key,
            [
                list(screen_classes(session, config, family, description=model.name).effort)
                for family in config.families
            ],
        )
    return [list(map(float, row)) for row in kept]


def _same(row: Mapping[str, Any]) -> bool:
    one, other = row["screened"], row["full"]
    findings = {verdict.value for verdict in FINDINGS}
    if one["verdict"] in findings and other["verdict"] in findings:
        return bool(one["target"] == other["target"])
    return bool(one["verdict"] == other["verdict"])


def _hit(row: Mapping[str, Any], which: str) -> bool:
    found = row[which]
    return bool(found["verdict"] != Verdict.CLEAN.value and found["target"] == row["target"])


def _told(row: Mapping[str, Any]) -> str:
    parts = [f"target {row['target']}, ASR {row['planted']}"] if row["target"] is not None else []
    for which in ("screened", "full"):
        found = row[which]
        if found is not None:
            parts.append(
                f"{which}: {found['verdict']} {found['target']} (p {found['p_value']:.2g}, "
                f"{found['passes']:,} passes)"
                if found["p_value"] is not None
                else f"{which}: {found['reason']}"
            )
    return "; ".join(parts)
