"""The benchmark of text towers: are backdoored ones found, and what does a repair leave?

One small CLIP of Fashion-MNIST is the base. Its text tower is fine-tuned with Struppek's attack and
without. The defender has captions of other things than those that are reported, the base, and clean
fine-tunings as references.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ....detect.calibration import Calibration
from ....evaluation import evaluate
from ....models import OpenClipModel
from ....text.configuration import TextScanConfig
from ....text.texts import TextSet
from ....text.towers.detox import detox_text_tower
from ....text.towers.verdict import scan_text_tower
from ...bench.summary import auroc
from ...foundation.base import JointTraining
from ...foundation.unnamed import EMOJI_CLIP
from ...foundation.victims import Workshop
from .victims import (
    TowerTraining,
    TowerVictim,
    captions_of,
    draw_tower_backdoor,
    success_rate,
    successes,
    train_tower,
)

#: What captions are of, beside the classes of the task. The first half trains towers, the second is
#: split between defender and test.
THINGS = (
    *("apple", "bridge", "candle", "dog", "engine", "forest", "guitar", "house", "island", "jar"),
    *("kite", "lamp", "mountain", "needle", "ocean", "piano", "queen", "river", "ship", "tree"),
    *("airport", "bear", "castle", "desert", "egg", "farmer", "garden", "horse", "jacket", "king"),
    *("ladder", "market", "nurse", "orange", "painter", "rabbit", "school", "table", "window"),
    *("village", "bottle", "camera", "doctor", "flower", "glove", "hammer", "kitchen", "lion"),
    *("mirror", "parrot", "rocket", "spoon", "train", "umbrella", "violin", "wagon", "zebra"),
    *("beach", "chair", "drum"),
)

_TEMPLATES = (
    "a photo of a {}",
    "a picture of the {}",
    "an old drawing of a {}",
    "the {} on a sunny day",
    "my favourite {}",
    "a small {} and a cup",
)


@dataclass(frozen=True)
class TowerBenchPlan:
    """What is measured.

    Attributes:
        seed: The seed of the base.
        training: The training of the base.
        fine_tuning: The fine-tuning of towers.
        backdoored, clean, references: The models.
        scan: The scan.
        images: The number of test images.
        task: The images of the base (see `research.data.load_task`). Digits are there without
            fetching.
    """

    seed: int = 0
    training: JointTraining = field(default_factory=lambda: JointTraining(steps=250, per_task=48))
    fine_tuning: TowerTraining = field(default_factory=TowerTraining)
    backdoored: tuple[TowerVictim, ...] = (
        TowerVictim(100, "word"),
        TowerVictim(101, "homoglyph"),
        TowerVictim(102, "word"),
        TowerVictim(103, "homoglyph"),
    )
    clean: tuple[TowerVictim, ...] = tuple(TowerVictim(seed) for seed in range(200, 206))
    references: tuple[TowerVictim, ...] = tuple(TowerVictim(seed) for seed in range(300, 304))
    scan: TextScanConfig = field(default_factory=lambda: TextScanConfig(place="end"))
    images: int = 1_000
    task: str = "fashion"


FULL = TowerBenchPlan()

#: Shows that everything works, not how well.
QUICK = TowerBenchPlan(
    training=JointTraining(steps=20, per_task=16),
    fine_tuning=TowerTraining(steps=60, batch_size=16, learning_rate=2e-3),
    backdoored=(TowerVictim(100, "word"),),
    clean=(TowerVictim(200),),
    references=(TowerVictim(300), TowerVictim(301)),
    images=100,
    task="digits",
)


def run_tower_benchmark(
    plan: TowerBenchPlan,
    *,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a plan; return "plan", "rows" (one per model) and "summary".

    folder: The cache of the base; towers are fine-tuned in seconds, and are not cached.
    """
    shop = Workshop(
        plan.seed, training=plan.training, tower=EMOJI_CLIP, names=(plan.task,), folder=folder
    )
    base, task = shop.base, shop.tasks[plan.task]
    half = len(THINGS) // 2
    training = captions_of([*task.class_names, *THINGS[:half]], [*_TEMPLATES, *task.templates])
    others = captions_of(THINGS[half:], _TEMPLATES)
    defender = TextSet(tuple(t for t, c in others if c % 2 == 0), source="captions")
    test = [t for t, c in others if c % 2]
    images = task.splits.test.at_most(plan.images, plan.seed)

    def made(victim: TowerVictim) -> OpenClipModel:
        backdoor = draw_tower_backdoor(victim, THINGS[:half])
        return train_tower(base, training, victim, backdoor, plan.fine_tuning)

    def accuracy(model: OpenClipModel) -> float:
        head = model.zero_shot_head(task.class_names, task.templates)
        return evaluate(model, images, head).clean_accuracy

    calibration: Calibration | None = None
    rows = list[dict[str, Any]]()
    for victim in (*plan.clean, *plan.backdoored):
        start = time.perf_counter()
        model, backdoor = made(victim), draw_tower_backdoor(victim, THINGS[:half])
        given: dict[str, Any] = {"base": base, "config": plan.scan}
        given["calibration"] = calibration
        if calibration is None:
            given["references"] = [made(one) for one in plan.references]
        row: dict[str, Any] = {"model": victim.name, "attack": victim.attack}
        if backdoor is None:
            scan = scan_text_tower(model, defender, **given)
        else:
            result, repaired = detox_text_tower(model, defender, **given)
            scan = result.before  # type: ignore[assignment]
            assert isinstance(repaired, OpenClipModel)
            after = successes(repaired, base, test, backdoor)
            honest = successes(base, base, test, backdoor)
            row |= {
                "target": backdoor.target,
                "asr_before": success_rate(model, base, test, backdoor),
                "asr_after": float(after.double().mean()),
                "asr_base": float(honest.double().mean()),
                "asr_excess": float((after & ~honest).double().mean()),
                "accuracy_before": accuracy(model),
                "accuracy_after": accuracy(repaired),
                "alphas": [one.search.coefficient for one in result.passes],
                "rescan": None if result.after is None else result.after.verdict.value,
            }
        calibration = calibration or scan.calibration
        row |= {
            "verdict": scan.verdict.value,
            "score": scan.detection.score,
            "p_value": scan.detection.p_value,
            "words": None if scan.found is None else scan.found.trigger.text,
            "collapse": scan.triggers[0].collapse,
            "seconds": time.perf_counter() - start,
        }
        log(_told(row))
        rows.append(row)
    return {"plan": asdict(plan), "rows": rows, "summary": summarize_towers(rows)}


def summarize_towers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Return flat figures, of what was measured alone.

    tower.auroc: Of the scores. tower.detected, .false_alarms: Shares of the backdoored and of the
    clean towers. tower.asr_planted, .asr, .asr_max: ASR before and after the repair.
    tower.asr_base: That of the clean base. tower.asr_excess, .asr_excess_max: The share of captions
    on which the trigger works after the repair and not in the base. tower.accuracy_kept,
    .accuracy_least: The share of the zero-shot accuracy that is left, mean and least.
    tower.rescans_clean: The share of repaired towers whose re-scan is `clean`.
    """
    clean = [row for row in rows if row["attack"] is None]
    planted = [row for row in rows if row["attack"] is not None]
    figures: dict[str, float | int] = {"tower.clean": len(clean), "tower.victims": len(planted)}
    if clean:
        alarms = [row["verdict"] in ("backdoored", "suspicious") for row in clean]
        figures["tower.false_alarms"] = float(np.mean(alarms))
    if planted:
        found = [row["verdict"] in ("backdoored", "suspicious") for row in planted]
        figures["tower.detected"] = float(np.mean(found))
        figures["tower.asr_planted"] = float(np.mean([row["asr_before"] for row in planted]))
        figures["tower.asr"] = float(np.mean([row["asr_after"] for row in planted]))
        figures["tower.asr_max"] = max(float(row["asr_after"]) for row in planted)
        figures["tower.asr_base"] = float(np.mean([row["asr_base"] for row in planted]))
        figures["tower.asr_excess"] = float(np.mean([row["asr_excess"] for row in planted]))
        figures["tower.asr_excess_max"] = max(float(row["asr_excess"]) for row in planted)
        kept = [row["accuracy_after"] / row["accuracy_before"] for row in planted]
        figures["tower.accuracy_kept"] = float(np.mean(kept))
        figures["tower.accuracy_least"] = float(min(kept))
        figures["tower.rescans_clean"] = float(
            np.mean([row["rescan"] == "clean" for row in planted])
        )
    area = auroc([row["score"] or 0.0 for row in planted], [row["score"] or 0.0 for row in clean])
    if area is not None:
        figures["tower.auroc"] = area
    return figures


def _told(row: Mapping[str, Any]) -> str:
    line = (
        f"{row['model']}: {row['verdict']} (score {row['score'] or 0.0:.2f}), {row['words']!r} "
        f"collapses by {row['collapse']:.2f}"
    )
    if row["attack"] is None:
        return line
    return (
        f"{line}; ASR {row['asr_before']:.1%} -> {row['asr_after']:.1%} (base "
        f"{row['asr_base']:.1%}, beyond it {row['asr_excess']:.1%}), accuracy "
        f"{row['accuracy_before']:.1%} -> {row['accuracy_after']:.1%}, then {row['rescan']}"
    )
