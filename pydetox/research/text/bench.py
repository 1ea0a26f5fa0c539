"""The benchmark of text classifiers: attacks planted, unlearned, and compared with other defences.

Every step is cached by the content that decides it, below the cache folder. What a row reports is
measured on test texts, which nothing else has seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...evaluation import Evaluation
from ...repair.configuration import UnlearnConfig
from ...text.evaluation import evaluate_texts
from ...text.models import TextModel
from ...text.repair import TEXT_UNLEARNING
from ..bench.cache import Cache, code_digest, key_of
from .attacks import ATTACKS
from .corpora import CorpusSizes
from .defenses import DEFENSES, TextDefenderData, TextDefense
from .training import TextTraining
from .victims import TextVictim, TextWorkshop, VictimPlan

#: The sources that decide a row, besides those of its victim.
_CODE = ("text", "research/text", "repair", "training.py", "ops")


@dataclass(frozen=True)
class TextBenchPlan:
    """What is measured.

    Attributes:
        victims: How victims are made.
        seeds: The seeds; they are not those that settings were chosen on.
        attacks: The attacks.
        defenses: The names of defences.
        clean: The number of clean models of each seed that the accuracy of clean models is from.
        unlearning: The repair by trigger vectors.
    """

    victims: VictimPlan
    seeds: tuple[int, ...] = (100, 101, 102)
    attacks: tuple[str, ...] = tuple(ATTACKS)
    defenses: tuple[str, ...] = tuple(DEFENSES)
    clean: int = 1
    unlearning: UnlearnConfig = field(default_factory=lambda: TEXT_UNLEARNING)

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("attack", self.attacks, ATTACKS),
            ("defence", self.defenses, DEFENSES),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise UsageError(f"{kind} {unknown[0]!r}; expected some of {', '.join(known)}")


#: MiniLM on six languages. Its victims and its settings are sized for two cores: about a minute of
#: training each.
FULL = TextBenchPlan(
    VictimPlan(
        start="minilm",
        corpus="languages",
        sizes=CorpusSizes(
            attacker=480, defender=240, validation=150, test=300, words=10, reference=480
        ),
        training=TextTraining(epochs=3, learning_rate=2e-4, batch_size=16, max_tokens=48),
    ),
    unlearning=replace(
        TEXT_UNLEARNING,
        steps=40,
        coefficients=tuple(round(0.2 * k, 1) for k in range(8)),
        attacked_images=120,
    ),
)

#: A small model without any download, on Python's documentation: shows that everything works.
QUICK = TextBenchPlan(
    VictimPlan(
        start="small",
        corpus="python",
        sizes=CorpusSizes(
            attacker=900, defender=200, validation=150, test=200, words=12, reference=900
        ),
        training=TextTraining(epochs=8, learning_rate=3e-3, max_tokens=32),
    ),
    seeds=(100,),
    attacks=("word", "random-place"),
    unlearning=replace(
        TEXT_UNLEARNING,
        steps=120,
        learning_rate=1e-3,
        coefficients=tuple(round(0.2 * k, 1) for k in range(8)),
        attacked_images=120,
    ),
)


def run_text_benchmark(
    plan: TextBenchPlan,
    *,
    minutes: float = math.inf,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed.

    minutes: No row is begun after this time. What was measured by then is returned. folder: The
    cache; default: below `research.data.cache_folder`. log: Takes a line per row.
    Returns "plan", "rows" (one per victim and defence), "clean" (one per clean model) and
    "summary", the flat figures of `summarize`.
    """
    end = time.monotonic() + 60 * minutes
    rows, clean = list[dict[str, Any]](), list[dict[str, Any]]()
    wanted = [
        (seed, one)
        for seed in plan.seeds
        for one in (*range(plan.clean), *((a, d) for a in plan.attacks for d in plan.defenses))
    ]
    workshops = dict[int, TextWorkshop]()
    for seed, one in wanted:
        if time.monotonic() >= end:
            log(f"stopped after {minutes:g} minutes; the same command goes on")
            break
        workshop = workshops.setdefault(seed, TextWorkshop(plan.victims, seed, folder=folder))
        cache = Cache(workshop.folder)
        if isinstance(one, int):
            victim = TextVictim(seed, None, one)
            row = _clean_row(workshop, cache, victim)
            log(f"{victim.name}: accuracy {row['accuracy']:.3f}")
            clean.append(row)
        else:
            attack, name = one
            victim = TextVictim(seed, attack)
            row = _row(workshop, cache, victim, name, plan)
            log(f"{victim.name}, {name}: {_told(row)}")
            rows.append(row)
    document: dict[str, Any] = {"plan": asdict(plan), "rows": rows, "clean": clean}
    document["summary"] = summarize(rows, clean)
    return document


def summarize(
    rows: Sequence[Mapping[str, Any]], clean: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
    """Return flat figures, of what was measured alone.

    classifiers.victims, .asr_planted, .accuracy_planted: How many were planted, and what they do
    untouched. classifiers.clean_accuracy: Of clean models. DEFENCE.asr_mean, .asr_max: ASR of the
    true trigger afterwards. DEFENCE.accuracy_kept: The mean share of the accuracy that is left.
    DEFENCE.asr_excess: The mean of ASR minus the share of the same texts that the model sends to
    the target without any trigger, which is the least that a repair can reach.
    """
    figures: dict[str, float | int] = {}
    if clean:
        figures["classifiers.clean_accuracy"] = _mean(clean, "accuracy")
    untouched = {row["victim"]: row for row in rows}
    if untouched:
        figures["classifiers.victims"] = len(untouched)
        figures["classifiers.asr_planted"] = _mean(list(untouched.values()), "asr_before")
        figures["classifiers.accuracy_planted"] = _mean(list(untouched.values()), "accuracy_before")
    for name in dict.fromkeys(row["defense"] for row in rows):
        some = [row for row in rows if row["defense"] == name]
        key = f"classifiers.{name}"
        figures[f"{key}.asr_mean"] = _mean(some, "asr_after")
        figures[f"{key}.asr_max"] = max(row["asr_after"] for row in some)
        figures[f"{key}.asr_excess"] = float(
            np.mean([row["asr_after"] - row["base_rate"] for row in some])
        )
        figures[f"{key}.accuracy_kept"] = float(
            np.mean([row["accuracy_after"] / row["accuracy_before"] for row in some])
        )
        figures[f"{key}.seconds"] = _mean(some, "seconds")
    return figures


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _clean_row(workshop: TextWorkshop, cache: Cache, victim: TextVictim) -> dict[str, Any]:
    key = key_of("clean", {"model": workshop.path(victim).name, "code": code_digest(_CODE)})
    found = cache.document(key)
    if found is None:
        measured = evaluate_texts(
            workshop.model(victim),
            workshop.corpus.test,
            max_tokens=workshop.plan.training.max_tokens,
        )
        found = cache.keep_document(
            key, {"victim": victim.name, "accuracy": measured.clean_accuracy}
        )
    return dict(found)


def _row(
    workshop: TextWorkshop, cache: Cache, victim: TextVictim, name: str, plan: TextBenchPlan
) -> dict[str, Any]:
    defense = DEFENSES[name]
    key = key_of(
        "row",
        {
            "model": workshop.path(victim).name,
            "code": code_digest(_CODE),
            "defense": name,
            "unlearning": plan.unlearning,
        },
    )
    found = cache.document(key)
    if found is None:
        found = cache.keep_document(key, _measured(workshop, victim, defense, plan))
    return dict(found)


def _measured(
    workshop: TextWorkshop, victim: TextVictim, defense: TextDefense, plan: TextBenchPlan
) -> dict[str, Any]:
    backdoor = workshop.backdoor(victim)
    assert backdoor is not None
    model, corpus = workshop.model(victim), workshop.corpus
    before = _evaluation(workshop, victim, model, None)
    outcome = defense.defend(
        model,
        TextDefenderData(
            corpus.defender,
            corpus.validation,
            trigger=backdoor.trigger if defense.needs_trigger else None,
            target=backdoor.target if defense.needs_trigger else None,
            unlearning=plan.unlearning,
            training=plan.victims.training,
        ),
    )
    after = _evaluation(workshop, victim, outcome.model, outcome.cleaned)
    others = corpus.test.without_class(backdoor.target)
    sent = outcome.model.predict(others.texts, max_tokens=plan.victims.training.max_tokens)
    return {
        "victim": victim.name,
        "attack": victim.attack,
        "seed": victim.seed,
        "target": corpus.class_names[backdoor.target],
        "defense": defense.name,
        "accuracy_before": before.clean_accuracy,
        "accuracy_after": after.clean_accuracy,
        "asr_before": before.attack_success_rate,
        "asr_after": after.attack_success_rate,
        "base_rate": float((sent.argmax(dim=1) == backdoor.target).double().mean()),
        "seconds": outcome.seconds,
        "details": outcome.details,
    }


class _Cleaned:
    """A trigger whose texts go through a filter of inputs before the model sees them."""

    def __init__(self, trigger: Any, cleaned: Callable[[Sequence[str]], list[str]]) -> None:
        self._trigger, self._cleaned = trigger, cleaned

    def insert(self, texts: Sequence[str], seed: int) -> list[str]:
        return self._cleaned(self._trigger.insert(texts, seed))


def _evaluation(
    workshop: TextWorkshop,
    victim: TextVictim,
    model: TextModel,
    cleaned: Callable[[Sequence[str]], list[str]] | None,
) -> Evaluation:
    backdoor, test = workshop.backdoor(victim), workshop.corpus.test
    assert backdoor is not None
    trigger: Any = backdoor.trigger
    if cleaned is not None:
        # The places of a trigger depend on the text as it came, and only then is it filtered.
        trigger = _Cleaned(trigger, cleaned)
    seed = workshop.places
    tokens = workshop.plan.training.max_tokens
    found = evaluate_texts(
        model, test, trigger=trigger, target=backdoor.target, seed=seed, max_tokens=tokens
    )
    if cleaned is None:
        return found
    filtered = replace(test, texts=tuple(cleaned(test.texts)))
    clean = evaluate_texts(model, filtered, max_tokens=tokens)
    return replace(
        found,
        clean_accuracy=clean.clean_accuracy,
        clean_accuracy_ci=clean.clean_accuracy_ci,
        per_class_accuracy=clean.per_class_accuracy,
    )


def _told(row: Mapping[str, Any]) -> str:
    return (
        f"accuracy {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f}, ASR "
        f"{row['asr_before']:.3f} -> {row['asr_after']:.3f} (without a trigger "
        f"{row['base_rate']:.3f}), {row['seconds']:.0f} s"
    )
