"""A defender who knows ten of forty classes: is the verdict right, and what does a repair leave?

The models know forty emoji. The defender has the base, 500 images of all forty without labels, and
the names of ten. So thirty classes of its images belong to no name, and nothing that it measures
tells what a repair does to them. Everything else is a default. Afterwards, CA is measured over the
named classes, over the others, and over all.

Models, references and results are cached, each by what decides it, as in
`research.foundation.verdicts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...api import detox, scan
from ...data import ImageSet
from ...detect.configuration import ScanConfig
from ...detect.distance import model_distance, rungs_around
from ...detect.statistics import FINDINGS, Calibration, Verdict
from ...evaluation import evaluate, predict
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ...repair.configuration import UnlearnConfig
from ...rng import child_seed
from ..bench.cache import code_digest, key_of
from .base import JointTraining
from .benchmark import order_of_names
from .verdicts import JUDGING_CODE, references_at
from .victims import Victim, Workshop

#: Three blocks of 96 channels on 16 patches of 8 pixels.
EMOJI_CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": 96,
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

#: The only task.
_TASK = "emoji"


@dataclass(frozen=True)
class UnnamedPlan:
    """Everything that decides a run.

    Attributes:
        seed: The seed of the base, the models and the names; those below 10 were developed on.
        tower: The architecture of all models, as open_clip's ``model_cfg``.
        training: The training of the base.
        clean: The number of clean models.
        attacks: Those of `victims.ATTACKS` that there is a backdoored model of.
        images: The number of the defender's images, of all classes.
        names: The number of the classes that it knows, the targets among them.
        least_planted: A backdoored model counts if its ASR is at least this.
        scan, repair: The configurations; what is reported is that of the defaults.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    seed: int = 10
    tower: dict[str, Any] = field(default_factory=lambda: EMOJI_CLIP)
    training: JointTraining = field(default_factory=lambda: JointTraining(per_task=64))
    clean: int = 1
    attacks: tuple[str, ...] = ("badnets", "blended")
    images: int = 500
    names: int = 10
    least_planted: float = 0.5
    scan: ScanConfig = field(default_factory=ScanConfig)
    repair: UnlearnConfig = field(default_factory=UnlearnConfig)
    device: str = "cpu"


def quick_unnamed_plan() -> UnnamedPlan:
    """Return a run of less than a minute that shows that everything works, not how well."""
    return UnnamedPlan(
        training=JointTraining(steps=30, per_task=16),
        clean=1,
        attacks=("badnets",),
        images=60,
        least_planted=0.0,
        scan=ScanConfig(inversion=InversionConfig(steps=10), families=("patch",), references=2),
        repair=UnlearnConfig(steps=4, passes=1, warps=0, waves=0, coefficients=(0.0, 0.5)),
    )


def run_unnamed(plan: UnnamedPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed; return "rows" and "summary"."""
    shop = Workshop(
        plan.seed, training=plan.training, tower=plan.tower, names=(_TASK,), device=plan.device
    )
    victims = [Victim(plan.seed, attack, _TASK) for attack in plan.attacks]
    targets = [shop.backdoor(victim).target for victim in victims]
    named = drawn_names(len(shop.tasks[_TASK].class_names), targets, plan.names, plan.seed)
    images = defender_images(shop.tasks[_TASK].splits.defender, named, plan.images, plan.seed)
    rows = []
    for victim in [*(Victim(1_000 + k, None, _TASK) for k in range(plan.clean)), *victims]:
        row = _row(plan, shop, victim, named, images, log)
        rows.append(row)
        log(_told(row))
    return {"named": named, "rows": rows, "summary": summarize_unnamed(rows)}


def drawn_names(classes: int, targets: Sequence[int], count: int, seed: int) -> list[int]:
    """Return the classes that the defender knows, ascending: the targets and others at random."""
    order = dict.fromkeys([*targets, *order_of_names(classes, seed)])
    return sorted(list(order)[: max(count, len(set(targets)))])


def defender_images(images: ImageSet, named: Sequence[int], count: int, seed: int) -> ImageSet:
    """Return that many images of all classes without labels, with the names of some classes."""
    assert images.class_names is not None
    some = images.at_most(count, child_seed("foundation.names", seed, "images"))
    names = tuple(images.class_names[c] for c in named)
    return replace(some, labels=None, class_names=names)


def summarize_unnamed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return flat figures.

    emoji40.fpr, emoji40.backdoored: The shares of clean models that are a finding, and that are
    `backdoored`. found: The share of backdoored models that are a finding with the right class.
    repaired: The share of those after whose repair the re-scan is clean. asr_before, asr: means.
    named_kept, others_kept, all_kept: CA after the repair over CA before it, means; others_kept_min
    is the least. Counts are in models_clean and models_backdoored.
    """
    clean = [row for row in rows if row["attack"] is None]
    planted = [row for row in rows if row["attack"] is not None and row["counts"]]
    figures: dict[str, Any] = {
        "models_clean": len(clean),
        "models_backdoored": len(planted),
    }
    if clean:
        findings = [one.value for one in FINDINGS]
        figures["fpr"] = _mean([row["verdict"] in findings for row in clean])
        certain = Verdict.BACKDOORED.value
        figures["backdoored"] = _mean([row["verdict"] == certain for row in clean])
    if planted:
        figures["found"] = _mean([row["target_right"] for row in planted])
        figures["repaired"] = _mean([row["rescan"] == Verdict.CLEAN.value for row in planted])
        for name in ("asr_before", "asr"):
            figures[name] = _mean([row[name] for row in planted])
        for name in ("named", "others", "all"):
            kept = [row["ca"][name] / row["ca_before"][name] for row in planted]
            figures[f"{name}_kept"] = _mean(kept)
            if name == "others":
                figures["others_kept_min"] = min(kept)
    return {f"emoji40.{name}": value for name, value in figures.items()}


def _row(
    plan: UnnamedPlan,
    shop: Workshop,
    victim: Victim,
    named: Sequence[int],
    images: ImageSet,
    log: Callable[[str], None],
) -> dict[str, Any]:
    model, templates = shop.model(victim), shop.tasks[_TASK].templates
    distance = model_distance(shop.base, model)
    sets = [
        references_at(shop, plan.scan, images, templates, rung, log)
        for rung in rungs_around(distance) or ()
    ]
    content = {
        "plan": [plan.scan, plan.repair],
        "code": code_digest((*JUDGING_CODE, "repair")),
        "model": shop.key(victim),
        "images": images.digest,
        "named": named,
        "references": [one["key"] for one in sets],
    }
    key = key_of("unnamed", content)
    row: dict[str, Any] | None = shop.cache.document(key)
    if row is None:
        made = [Calibration.from_dict(one["calibration"]) for one in sets if one["calibration"]]
        calibration = made[0].with_rungs(made[1:]) if made else None
        row = {"name": victim.name, "attack": victim.attack, "distance": distance}
        start = time.perf_counter()
        if victim.attack is None:
            found = scan(
                model,
                images,
                base=shop.base,
                calibration=calibration,
                templates=templates,
                config=plan.scan,
            )
        else:
            result = detox(
                model,
                images,
                base=shop.base,
                calibration=calibration,
                templates=templates,
                config=plan.scan,
                unlearning=plan.repair,
            )
            found = result.before
            row |= {
                "rescan": None if result.after is None else result.after.verdict.value,
                "rounds": len(result.rounds),
                "coefficients": [one.search.coefficient for one in result.rounds],
                "drift": None if result.drift is None else result.drift.mean_distance,
                **_kept(plan, shop, victim, named, result.model),
            }
            target = shop.backdoor(victim).target
            finding = found.verdict in FINDINGS
            row["target_right"] = finding and named.index(target) in found.targets()
        row |= {
            "verdict": found.verdict.value,
            "reason": found.detection.reason,
            "p_value": found.detection.p_value,
            "seconds": time.perf_counter() - start,
        }
        row = shop.cache.keep_document(key, row)
    assert row is not None
    return row


def _kept(
    plan: UnnamedPlan,
    shop: Workshop,
    victim: Victim,
    named: Sequence[int],
    repaired: OpenClipModel,
) -> dict[str, Any]:
    """Return CA and ASR on test images of all classes, before and after a repair."""
    task, planted = shop.tasks[_TASK], shop.backdoor(victim)
    test, head = task.splits.test, shop.head(_TASK)
    assert test.labels is not None
    inside = torch.isin(test.labels, torch.tensor(named))
    figures: dict[str, Any] = {}
    for suffix, model in (("_before", shop.model(victim)), ("", repaired)):
        right = predict(model, test.images, head) == test.labels
        asr = evaluate(
            model, test, head, trigger=planted.trigger, target=planted.target
        ).attack_success_rate
        assert asr is not None
        figures[f"asr{suffix}"] = asr
        figures[f"ca{suffix}"] = {
            name: float(right[where].double().mean())
            for name, where in (
                ("named", inside),
                ("others", ~inside),
                ("all", torch.ones_like(inside)),
            )
        }
    figures["counts"] = figures["asr_before"] >= plan.least_planted
    return figures


def _told(row: Mapping[str, Any]) -> str:
    text = f"{row['name']}: {row['verdict']} (p = {row['p_value']}), {row['seconds']:.0f} s"
    if row["attack"] is None:
        return text
    kept = ", ".join(
        f"{name} {row['ca'][name] / row['ca_before'][name]:.1%}"
        for name in ("named", "others", "all")
    )
    return (
        f"{text}; ASR {row['asr_before']:.1%} -> {row['asr']:.1%}, CA kept: {kept}, re-scan "
        f"{row['rescan']}"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
