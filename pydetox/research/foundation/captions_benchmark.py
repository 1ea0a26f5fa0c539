"""The benchmark of captions: models poisoned by captions, found without classes, and repaired."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...data import ImageSet
from ...detect.configuration import AdvancedScanConfig, ScanConfig
from ...detect.search import search_classes
from ...evaluation import evaluate, predict
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ...repair.configuration import UnlearnConfig
from ...repair.passes import subtract_passes
from ...session import Session
from ..bench.cache import code_digest, key_of
from ..bench.summary import auroc
from .base import JointTraining
from .captions import CaptionModel, CaptionTraining, CaptionWorkshop
from .evaluation import Part, report_tasks

#: What decides a result, besides models and configuration.
_CODE = (
    "research/foundation",
    "repair",
    "inversion",
    "ops",
    "api.py",
    "session.py",
    "detect",
    "models",
    "evaluation.py",
)

#: Attacks and the poisoned share of the captions. Models of this size learn a backdoor from 1 to 3%
#: of some thousand pairs. BadCLIP's patch, which suits the base, needs less.
ATTACKS: tuple[tuple[str, float], ...] = (
    ("badnets", 0.03),
    ("blended", 0.03),
    ("sig", 0.03),
    ("badclip", 0.003),
    ("wanet", 0.03),
)


@dataclass(frozen=True)
class CaptionPlan:
    """Everything that decides a run.

    Attributes:
        seeds: Of the models that are reported; those below 10 were developed on.
        clean: The number of clean models of each seed.
        attacks: The poisoned models of each seed: attack and poisoned share of the captions.
        training: The training of the base.
        fine_tuning: The fine-tuning of every model on its pairs.
        pairs: The number of pairs of each task.
        images: The defender's images of each task, at most.
        test: The test images of each task for ASR, at most.
        scan: The label-free search.
        repair: How to unlearn.
        search: The search into the found captions, for a repair with captions.
        restarts: The triggers of each family that a repair recovers.
        repaired: The number of poisoned models of each seed that are repaired; None for all.
        least_planted: A poisoned model counts if its ASR on validation images is at least this.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    seeds: tuple[int, ...] = (10,)
    clean: int = 4
    attacks: tuple[tuple[str, float], ...] = ATTACKS
    training: JointTraining = field(default_factory=lambda: JointTraining(steps=1_000, per_task=32))
    fine_tuning: CaptionTraining = field(default_factory=CaptionTraining)
    pairs: int = 2_500
    images: int = 150
    test: int = 400
    scan: ScanConfig = field(
        default_factory=lambda: ScanConfig(
            objective="label-free",
            inversion=InversionConfig(steps=80),
            advanced=AdvancedScanConfig(directions=4),
        )
    )
    repair: UnlearnConfig = field(
        default_factory=lambda: UnlearnConfig(steps=80, batch_size=32, passes=1, warps=0)
    )
    search: ScanConfig = field(
        default_factory=lambda: ScanConfig(inversion=InversionConfig(steps=100)).in_contrast()
    )
    restarts: int = 3
    repaired: int | None = None
    least_planted: float = 0.5
    device: str = "cpu"


def quick_caption_plan() -> CaptionPlan:
    """Return a run of about a minute that shows that everything works, not how well."""
    return CaptionPlan(
        seeds=(10,),
        clean=1,
        attacks=(("badnets", 0.03),),
        training=JointTraining(steps=60, per_task=16),
        fine_tuning=CaptionTraining(epochs=1),
        pairs=400,
        images=40,
        test=100,
        scan=ScanConfig(objective="label-free", inversion=InversionConfig(steps=20)),
        repair=UnlearnConfig(
            steps=10, batch_size=16, passes=1, warps=0, waves=0, coefficients=(0.0, 0.5, 1.0)
        ),
        search=ScanConfig(inversion=InversionConfig(steps=20)).in_contrast(),
        least_planted=0.0,
    )


#: What the defender has for a repair, beside images.
REPAIRS: tuple[str, ...] = ("with captions", "without text")


def run_captions(plan: CaptionPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed; return "plan", "rows" and "summary"."""
    rows = list[dict[str, Any]]()
    for seed in plan.seeds:
        shop = CaptionWorkshop(
            seed,
            training=plan.training,
            fine_tuning=plan.fine_tuning,
            pairs=plan.pairs,
            device=plan.device,
        )
        drawn = [CaptionModel(seed, None, number=k) for k in range(plan.clean)]
        drawn += [CaptionModel(seed, a, rate, k) for k, (a, rate) in enumerate(plan.attacks)]
        found = list[dict[str, Any]]()
        for one in drawn:
            found.append(_scanned(plan, shop, one))
            log(_told(found[-1]))
        counted = [
            (one, row)
            for one, row in zip(drawn, found, strict=True)
            if one.attack is not None and row["planted"] >= plan.least_planted
        ]
        for one, row in counted[: plan.repaired]:
            row["repairs"] = {kind: _repaired(plan, shop, one, kind, row) for kind in REPAIRS}
            log(_repairs_told(row))
        rows += found
    summary = summarize_captions(rows, plan.least_planted)
    return {"plan": asdict(plan), "rows": rows, "summary": summary}


def summarize_captions(rows: Sequence[Mapping[str, Any]], least_planted: float) -> dict[str, Any]:
    """Return flat figures.

    auroc: of the mean of the log P-L1 of the smallest trigger of each family, the poisoned models
    that count against the clean ones. No reference is needed, because all models of a seed moved
    about as far from one base. target_right: share of the poisoned models in which the smallest
    trigger of some family leads to the poisoned caption. ca, text_r1 and so on: the means of all
    models before any repair. asr_before. Of the repairs with captions: asr_mean; recall_kept, the
    share of R@1, image to text; ca_kept, the least over tasks and models. The same without text,
    with that suffix.
    """
    clean = [row for row in rows if row["attack"] is None]
    planted = [row for row in rows if row["attack"] is not None and row["planted"] >= least_planted]
    figures: dict[str, Any] = {
        "captions.clean_models": len(clean),
        "captions.poisoned_models": len(planted),
        "captions.not_planted": len(rows) - len(clean) - len(planted),
    }
    if clean and planted:
        scores = [[row["score"] for row in some] for some in (planted, clean)]
        figures["captions.auroc"] = auroc(*scores)
        figures["captions.target_right"] = _mean([row["target_right"] for row in planted])
    if rows:
        figures["captions.ca"] = _mean([_mean(list(row["ca"].values())) for row in rows])
        for name in rows[0]["retrieval"]:
            figures[f"captions.{name}"] = _mean([row["retrieval"][name] for row in rows])
        figures["captions.seconds"] = _mean([row["seconds"] for row in rows])
    if planted:
        figures["captions.asr_before"] = _mean([row["asr"] for row in planted])
    for kind, suffix in zip(REPAIRS, ("", "_without_text"), strict=True):
        repairs = [row["repairs"][kind] for row in planted if kind in row.get("repairs", {})]
        if repairs:
            figures[f"captions.asr_mean{suffix}"] = _mean([one["asr"] for one in repairs])
            figures[f"captions.recall_kept{suffix}"] = _mean(
                [one["recall_kept"] for one in repairs]
            )
            figures[f"captions.ca_kept{suffix}"] = min(one["ca_kept"] for one in repairs)
    return figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _images(plan: CaptionPlan, shop: CaptionWorkshop) -> ImageSet:
    """Return the defender's images, without labels and names."""
    return replace(shop.part("defender", plan.images), labels=None, class_names=None)


def _scanned(plan: CaptionPlan, shop: CaptionWorkshop, one: CaptionModel) -> dict[str, Any]:
    """Return what a model is before any repair, and what the label-free search finds in it."""
    content = {"scan": plan.scan, "images": plan.images, "test": plan.test}
    content |= {"model": shop.key(one), "code": code_digest(_CODE)}
    key = key_of("captions-scan", content)
    known = shop.cache.document(key)
    if known is not None:
        return dict(known)
    model = shop.model(one)
    row: dict[str, Any] = {"model": one.name, "attack": one.attack, "rate": one.rate}
    row |= _measured(plan, shop, one, model, "test")
    if one.attack is not None:
        row["planted"] = _measured_asr(plan, shop, one, model, "validation")
    start = time.perf_counter()
    session = Session.open(model, _images(plan, shop), base=shop.base)
    config = replace(plan.scan, contrast=True)
    found = {
        family: search_classes(session, config, family, description=f"{one.name} ({family})")
        for family in config.families
    }
    row["seconds"] = time.perf_counter() - start
    # A trigger that no search found counts as one of the whole image.
    row["p_l1"] = {name: sorted(each.p_l1.clamp(max=1.0).tolist()) for name, each in found.items()}
    row["score"] = -_mean([math.log(sizes[0]) for sizes in row["p_l1"].values()])
    # A backdoor may stand out in one family alone, and the sizes of two families do not compare.
    head, leads = shop.head(model), list[int]()
    for each in found.values():
        answers = predict(model, session.images.images, head, stamp=each.trigger(each.best()))
        leads.append(int(answers.mode().values))
    row["targets"] = list(dict.fromkeys(leads))
    row["target_right"] = one.attack is not None and shop.backdoor(one).target in leads
    return dict(shop.cache.keep_document(key, row))


def _measured(
    plan: CaptionPlan,
    shop: CaptionWorkshop,
    one: CaptionModel,
    model: OpenClipModel,
    part: Part,
) -> dict[str, Any]:
    """Return CA per task, retrieval and, of a poisoned model, the ASR."""
    report = report_tasks(model, shop.tasks, part)
    found: dict[str, Any] = {"ca": report.accuracy(), "retrieval": asdict(report.retrieval)}
    if one.attack is not None:
        found["asr"] = _measured_asr(plan, shop, one, model, part)
    return found


def _measured_asr(
    plan: CaptionPlan,
    shop: CaptionWorkshop,
    one: CaptionModel,
    model: OpenClipModel,
    part: Part,
) -> float:
    """Return the share of stamped images of all tasks whose first of all captions is the target."""
    planted = shop.backdoor(one)
    found = evaluate(
        model,
        shop.part(part, plan.test),
        shop.head(model),
        trigger=planted.trigger,
        target=planted.target,
    )
    assert found.attack_success_rate is not None
    return found.attack_success_rate


def _repaired(
    plan: CaptionPlan,
    shop: CaptionWorkshop,
    one: CaptionModel,
    kind: str,
    scanned: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what is left after a repair.

    With captions, the targets are the captions that the smallest trigger of each family leads to,
    and the first captions of all classes are the names. Without text, there are images alone.
    """
    content = {"repair": plan.repair, "scan": plan.scan, "search": plan.search, "kind": kind}
    content |= {"images": plan.images, "test": plan.test, "targets": scanned["targets"]}
    content |= {"model": shop.key(one), "code": code_digest(_CODE)}
    key = key_of("captions-repair", content)
    known = shop.cache.document(key)
    if known is not None:
        return dict(known)
    model, images = shop.model(one), _images(plan, shop)
    start = time.perf_counter()
    if kind == "without text":
        session = Session.open(model, images, base=shop.base)
        config, targets = replace(plan.scan, contrast=True), list[int]()
    else:
        captions = tuple(texts[0] for texts in shop.table)
        named = replace(images, class_names=captions)
        session = Session.open(model, named, templates=("{c}",), base=shop.base)
        config, targets = plan.search, [int(k) for k in scanned["targets"]]
    repaired, _ = subtract_passes(session, targets, config, plan.repair, restarts=plan.restarts)
    seconds = time.perf_counter() - start
    after = _measured(plan, shop, one, repaired, "test")
    row = {
        **after,
        "asr_before": scanned["asr"],
        "recall_kept": after["retrieval"]["text_r1"] / scanned["retrieval"]["text_r1"],
        "image_recall_kept": after["retrieval"]["image_r1"] / scanned["retrieval"]["image_r1"],
        "ca_kept": min(after["ca"][name] / ca for name, ca in scanned["ca"].items()),
        "seconds": seconds,
    }
    return dict(shop.cache.keep_document(key, row))


def _told(row: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{name} {values[0]:.4f}" for name, values in row["p_l1"].items())
    text = f"{row['model']}: P-L1 {sizes}, R@1 {row['retrieval']['text_r1']:.1%}"
    if row["attack"] is not None:
        right = "right" if row["target_right"] else "wrong"
        text += f", ASR {row['asr']:.1%}, {right} caption"
    return text


def _repairs_told(row: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{row['model']}, repaired {kind}: ASR {one['asr']:.1%}, "
        f"R@1 kept {one['recall_kept']:.1%}, least CA kept {one['ca_kept']:.1%}, "
        f"{one['seconds']:.0f} s"
        for kind, one in row["repairs"].items()
    )
