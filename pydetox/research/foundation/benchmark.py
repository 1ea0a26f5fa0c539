"""The benchmark of tasks: victims, ways to repair them, and what is left of each task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ...api import unlearn
from ...data import ImageSet
from ...detect.configuration import ScanConfig
from ...evaluation import predict, wilson_interval
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ...repair.configuration import UnlearnConfig
from ...rng import generator
from ...training import TrainConfig
from ..bench.cache import code_digest, key_of
from ..defenses import (
    CleanClip,
    DefenderData,
    Defense,
    FinePruning,
    FineTuning,
    GradientAscent,
    KnownTrigger,
    Par,
)
from .base import JointTraining
from .defender import only_named
from .evaluation import TaskReport, report_tasks
from .victims import FINE_TUNING, Victim, Workshop, draw_victims

#: What decides a result, besides victims and configuration.
_CODE = (
    "research/foundation",
    "research/defenses",
    "repair",
    "inversion",
    "ops",
    "api.py",
    "session.py",
    "detect",
    "models",
    "evaluation.py",
)

#: Baselines, each with the setting that is chosen on the development seed.
BASELINES: tuple[Defense[Any], ...] = (
    FineTuning(),
    CleanClip(),
    Par(),
    FinePruning(),
    GradientAscent(),
)

#: pydetox without the trigger, with it, and its unlearning before features were held.
UNKNOWN, KNOWN, BEFORE = "pydetox, unknown trigger", "pydetox, known trigger", "names alone held"

#: pydetox for a defender who has the base and images of a task that was not attacked, and who knows
#: neither the trigger nor any class: the search is label-free.
ELSEWHERE = "pydetox, other images"

#: Those of pydetox, by what `bench_foundation.py --methods` calls them.
OWN = {"unknown": UNKNOWN, "known": KNOWN, "other-task": ELSEWHERE, "names-alone": BEFORE}

METHODS: tuple[str, ...] = (UNKNOWN, KNOWN, ELSEWHERE, BEFORE, *(one.name for one in BASELINES))

# Among equals, the setting that leaves the least of the backdoor within this much CA counts.
_LEAST_CA_KEPT = 0.97


@dataclass(frozen=True)
class FoundationPlan:
    """Everything that decides a run.

    Attributes:
        seeds: Of the models that are reported; those below 10 were developed on.
        tuning_seed: Of the models on whose validation images the baselines' settings are chosen.
        training, fine_tuning: Of base and victims.
        repair: pydetox's configuration.
        scan: How triggers are searched for, in contrast to the base.
        methods: Some of METHODS.
        attacks: Those of the victims, of `victims.ATTACKS`; None for all.
        most_victims: Of each seed; None for all.
        least_planted: A victim counts when its ASR on validation images is at least this.
        quarter: Whether the case of a quarter of the names is measured, on emoji victims.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    seeds: tuple[int, ...] = (10, 11, 12)
    tuning_seed: int = 0
    training: JointTraining = field(default_factory=JointTraining)
    fine_tuning: TrainConfig = FINE_TUNING
    repair: UnlearnConfig = field(default_factory=lambda: UnlearnConfig(min_accuracy_kept=0.98))
    scan: ScanConfig = field(
        default_factory=lambda: ScanConfig(
            inversion=InversionConfig(steps=120, precision="bfloat16")
        ).in_contrast()
    )
    methods: tuple[str, ...] = METHODS
    attacks: tuple[str, ...] | None = None
    most_victims: int | None = None
    least_planted: float = 0.5
    quarter: bool = True
    device: str = "cpu"


def quick_plan() -> FoundationPlan:
    """Return a run of minutes that shows that everything works, not how well."""
    return FoundationPlan(
        seeds=(10,),
        training=JointTraining(steps=200, per_task=24),
        repair=UnlearnConfig(
            steps=40,
            batch_size=32,
            passes=1,
            warps=0,
            waves=0,
            coefficients=(0.0, 0.5, 0.75, 1.0, 1.25, 1.5),
        ),
        scan=ScanConfig(inversion=InversionConfig(steps=60)).in_contrast(),
        methods=(UNKNOWN, KNOWN, FineTuning().name),
        most_victims=1,
        least_planted=0.0,
        quarter=False,
    )


def run(plan: FoundationPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed, and return rows and summary.

    Returns "plan", "victims" (before any repair), "rows" (one per counted victim and method),
    "quarter" (one per emoji victim and method) and "summary".
    """
    settings = _tuned(plan, log)
    victims, rows, quarter = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    for seed in plan.seeds:
        shop = _workshop(plan, seed)
        drawn = [
            victim
            for victim in draw_victims([seed])
            if plan.attacks is None or victim.attack in plan.attacks
        ]
        for victim in drawn[: plan.most_victims]:
            log(victim.name)
            before = _before(shop, victim)
            victims.append(before)
            if before["planted"] < plan.least_planted:
                continue
            for method in plan.methods:
                rows.append(_row(plan, shop, victim, method, settings.get(method, 0), "test"))
                log(f"  {method}: {_told(rows[-1])}")
            if plan.quarter and victim.task == "emoji":
                for method in (UNKNOWN, BEFORE):
                    if method in plan.methods:
                        quarter.append(_quarter_row(plan, shop, victim, method))
                        log(f"  {method}, a quarter of the names: {_quarter_told(quarter[-1])}")
    document = {
        "plan": asdict(plan),
        "settings": settings,
        "victims": victims,
        "rows": rows,
        "quarter": quarter,
    }
    document["summary"] = summarize(rows, quarter)
    return document


def summarize(
    rows: Sequence[Mapping[str, Any]], quarter: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return flat figures of the method without the trigger, and the same of all, by name.

    attacked_ca, other_ca_mean, other_ca_min: shares of CA kept, over victims: the mean of the
    attacked tasks, the mean and the least of all others. asr_mean, asr_max: on the attacked task.
    asr_transfer_max: the largest on another task. retrieval_kept: share of R@1, image to text.
    beaten: share of baselines that have a larger mean ASR, or a smaller mean of the other tasks.
    other_images: the same figures of the defender who has images of another task alone.
    """
    figures: dict[str, Any] = {}
    table = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        others = [
            share
            for row in of_method
            for name, share in row["kept"].items()
            if name != row["attacked"]
        ]
        table[method] = {
            "models": len(of_method),
            "attacked_ca": _mean([row["kept"][row["attacked"]] for row in of_method]),
            "other_ca_mean": _mean(others),
            "other_ca_min": min(others),
            "asr_mean": _mean([row["asr"] for row in of_method]),
            "asr_max": max(row["asr"] for row in of_method),
            "asr_transfer_max": max(v for row in of_method for v in row["transferred"].values()),
            "retrieval_kept": _mean([row["retrieval_kept"] for row in of_method]),
            "seconds": _mean([row["seconds"] for row in of_method]),
        }
    ours = table.get(UNKNOWN)
    if ELSEWHERE in table:
        figures |= {f"tasks.other_images.{key}": value for key, value in table[ELSEWHERE].items()}
    if ours is not None:
        figures |= {f"tasks.{key}": value for key, value in ours.items()}
        baselines = [table[one.name] for one in BASELINES if one.name in table]
        if baselines:
            figures["tasks.baselines_beaten"] = sum(
                one["asr_mean"] > ours["asr_mean"] + 0.005
                or one["other_ca_mean"] < ours["other_ca_mean"]
                for one in baselines
            ) / len(baselines)
    for method, prefix in ((UNKNOWN, "quarter"), (BEFORE, "quarter_before")):
        of_method = [row for row in quarter if row["method"] == method]
        if of_method:
            figures[f"{prefix}.named_ca"] = _mean([row["named_kept"] for row in of_method])
            figures[f"{prefix}.unnamed_ca"] = _mean([row["unnamed_kept"] for row in of_method])
            figures[f"{prefix}.unnamed_ca_min"] = min(row["unnamed_kept"] for row in of_method)
            figures[f"{prefix}.asr_mean"] = _mean([row["asr"] for row in of_method])
    return figures | {"methods": table}


def order_of_names(classes: int, seed: int) -> list[int]:
    """Return the classes in the order in which a defender gets to know their names."""
    order: list[int] = generator("foundation.names", seed).permutation(classes).tolist()
    return order


def other_task(attacked: str, names: Sequence[str]) -> str:
    """Return the task whose images a defender has who has none of the attacked one: the next."""
    return names[(list(names).index(attacked) + 1) % len(names)]


def quarter_of(classes: int, target: int, seed: int) -> list[int]:
    """Return a quarter of the classes, the target among them, ascending."""
    rest = [c for c in order_of_names(classes, seed) if c != target]
    return sorted([target, *rest[: classes // 4 - 1]])


def _workshop(plan: FoundationPlan, seed: int) -> Workshop:
    return Workshop(seed, training=plan.training, fine_tuning=plan.fine_tuning, device=plan.device)


def _before(shop: Workshop, victim: Victim) -> dict[str, Any]:
    key = key_of("before", {"victim": shop.key(victim), "code": code_digest(_CODE)})
    found = shop.cache.document(key)
    if found is None:
        planted = _report(shop, victim, shop.model(victim), "validation").attack_success_rate
        report = _report(shop, victim, shop.model(victim), "test")
        clean = report_tasks(shop.base, shop.tasks, "test")
        found = shop.cache.keep_document(
            key,
            {
                "victim": victim.name,
                "planted": planted,
                "base": clean.to_dict(),
                "report": report.to_dict(),
            },
        )
    return dict(found)


def _report(shop: Workshop, victim: Victim, model: OpenClipModel, part: str) -> TaskReport:
    planted = shop.backdoor(victim)
    return report_tasks(
        model,
        shop.tasks,
        "validation" if part == "validation" else "test",
        attacked=victim.task,
        trigger=planted.trigger,
        target=planted.target,
    )


def _row(
    plan: FoundationPlan, shop: Workshop, victim: Victim, method: str, setting: int, part: str
) -> dict[str, Any]:
    key = _key(plan, shop, victim, method, {"setting": setting, "part": part})
    found = shop.cache.document(key)
    if found is not None:
        return dict(found)
    given = victim.task if method != ELSEWHERE else other_task(victim.task, shop.names)
    model, images = shop.model(victim), shop.tasks[given].splits.defender
    target = shop.backdoor(victim).target
    start = time.perf_counter()
    repaired, details = _repair(plan, shop, victim, method, setting, images, target)
    seconds = time.perf_counter() - start
    before = _report(shop, victim, model, part)
    after = _report(shop, victim, repaired, part)
    row = {
        "victim": victim.name,
        "attacked": victim.task,
        "images": given,
        "method": method,
        "setting": setting,
        "kept": after.kept(before),
        "asr": after.attack_success_rate,
        "asr_before": before.attack_success_rate,
        "transferred": {name: one[0] for name, one in after.transferred.items()},
        "transferred_before": {name: one[0] for name, one in before.transferred.items()},
        "retrieval_kept": after.retrieval.text_r1 / before.retrieval.text_r1,
        "seconds": seconds,
        "details": details,
        "report": after.to_dict(),
    }
    return dict(shop.cache.keep_document(key, row))


def _quarter_row(
    plan: FoundationPlan, shop: Workshop, victim: Victim, method: str
) -> dict[str, Any]:
    """Return what is left when the defender has images and names of a quarter of the classes."""
    key = _key(plan, shop, victim, method, {"quarter": True})
    found = shop.cache.document(key)
    if found is not None:
        return dict(found)
    task, planted, model = shop.tasks[victim.task], shop.backdoor(victim), shop.model(victim)
    named = quarter_of(len(task.class_names), planted.target, victim.seed)
    images = only_named(task.splits.defender, named)
    repaired, details = _repair(plan, shop, victim, method, 0, images, named.index(planted.target))
    test, head = task.splits.test, shop.head(victim.task)
    assert test.labels is not None
    inside = torch.isin(test.labels, torch.tensor(named))
    right = [predict(one, test.images, head) == test.labels for one in (model, repaired)]
    shares = {
        name: [float(ok[where].double().mean()) for ok in right]
        for name, where in (("named", inside), ("unnamed", ~inside))
    }
    row = {
        "victim": victim.name,
        "method": method,
        "asr": _report(shop, victim, repaired, "test").attack_success_rate,
        "images": len(images),
        "named_kept": shares["named"][1] / shares["named"][0],
        "unnamed_kept": shares["unnamed"][1] / shares["unnamed"][0],
        "unnamed_interval": wilson_interval(int(right[1][~inside].sum()), int((~inside).sum())),
        **{f"{name}_ca": both for name, both in shares.items()},
        "details": details,
    }
    return dict(shop.cache.keep_document(key, row))


def _repair(
    plan: FoundationPlan,
    shop: Workshop,
    victim: Victim,
    method: str,
    setting: int,
    images: ImageSet,
    target: int,
) -> tuple[OpenClipModel, list[Any]]:
    model, templates = shop.model(victim), shop.tasks[victim.task].templates
    planted = shop.backdoor(victim)
    if method == ELSEWHERE:
        repaired, rounds = unlearn(
            model,
            replace(images, labels=None, class_names=None),
            (),
            base=shop.base,
            config=replace(plan.scan, objective="label-free", seed=victim.seed),
            unlearning=plan.repair,
        )
        return repaired, [asdict(one.search) for one in rounds]
    if method in (UNKNOWN, KNOWN, BEFORE):
        names_alone = replace(plan.repair, retention=0.0, max_drift=math.inf)
        repaired, rounds = unlearn(
            model,
            images,
            target,
            triggers=[planted.trigger] if method == KNOWN else None,
            base=shop.base,
            templates=templates,
            config=replace(plan.scan, seed=victim.seed),
            unlearning=names_alone if method == BEFORE else plan.repair,
        )
        return repaired, [asdict(one.search) for one in rounds]
    (defense,) = (one for one in BASELINES if one.name == method)
    data = DefenderData(
        images,
        templates,
        triggers=(KnownTrigger(planted.trigger, target),) if defense.needs_trigger else (),
    )
    return defense.defend(model, data, defense.grid[setting]).model, []


def _tuned(plan: FoundationPlan, log: Callable[[str], None]) -> dict[str, int]:
    """Return the setting of each baseline: the least ASR that keeps CA, on validation images."""
    chosen = {}
    wanted = [one for one in BASELINES if one.name in plan.methods]
    if plan.most_victims is not None:  # a quick run takes the defaults
        return {one.name: 0 for one in wanted}
    shop = _workshop(plan, plan.tuning_seed)
    victims = [v for v in draw_victims([plan.tuning_seed]) if v.attack in ("badnets", "blended")]
    for defense in wanted:
        log(f"settings of {defense.name}")
        scores = []
        for setting in range(len(defense.grid)):
            rows = [
                _row(plan, shop, victim, defense.name, setting, "validation") for victim in victims
            ]
            kept = _mean([row["kept"][row["attacked"]] for row in rows])
            asr = _mean([row["asr"] for row in rows])
            scores.append((kept < _LEAST_CA_KEPT, asr if kept >= _LEAST_CA_KEPT else -kept))
        chosen[defense.name] = scores.index(min(scores))
    return chosen


def _key(
    plan: FoundationPlan, shop: Workshop, victim: Victim, method: str, more: Mapping[str, Any]
) -> str:
    content = {
        "victim": shop.key(victim),
        "code": code_digest(_CODE),
        "method": method,
        **more,
    }
    if method in OWN.values():
        content |= {"repair": plan.repair, "scan": plan.scan}
    return key_of("task-row", content)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _told(row: Mapping[str, Any]) -> str:
    others = [v for name, v in row["kept"].items() if name != row["attacked"]]
    attacked = row["kept"][row["attacked"]]
    return (
        f"ASR {row['asr_before']:.1%} -> {row['asr']:.1%}, CA kept {attacked:.1%}, "
        f"other tasks {_mean(others):.1%}, least {min(others):.1%}, {row['seconds']:.0f} s"
    )


def _quarter_told(row: Mapping[str, Any]) -> str:
    return (
        f"ASR {row['asr']:.1%}, CA kept {row['named_kept']:.1%} of the named classes, "
        f"{row['unnamed_kept']:.1%} of the others"
    )
