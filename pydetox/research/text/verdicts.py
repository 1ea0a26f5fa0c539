"""Verdicts on text classifiers that nothing was chosen on, and repairs with the trigger unknown.

The defender has a base and clean models that were made as the suspect was, but on other texts, and
clean texts of a third kind. What a row says about a trigger is measured on test texts, which
neither side has seen. Models, references, scans and repairs are cached by the content that decides
them, so that a run that was stopped goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...detect.calibration import Calibration
from ...detect.statistics import FINDINGS
from ...errors import UsageError
from ...repair.configuration import UnlearnConfig
from ...text.configuration import TextScanConfig
from ...text.detox import detox_text_model
from ...text.evaluation import TextStamp, evaluate_texts
from ...text.models import TextModel
from ...text.references import calibrate_words
from ...text.repair import TEXT_UNLEARNING
from ...text.verdict import TextScanResult, scan_text_model
from ..bench.cache import Cache, code_digest, key_of
from ..bench.summary import auroc
from .attacks import ATTACKS, INSERTIONS, Insertion
from .bench import FULL, QUICK
from .victims import TextVictim, TextWorkshop, VictimPlan

#: The sources that decide a verdict, besides those of the models, and those that decide a repair.
_JUDGING = ("text", "detect", "ops", "research/text/verdicts.py")
_REPAIRING = (*_JUDGING, "repair", "training.py")


@dataclass(frozen=True)
class TextVerdictPlan:
    """What is judged.

    Attributes:
        victims: How models are made; `sizes.reference` texts are those of the defender's models.
        seeds: The seeds; they are not those that settings were chosen on.
        attacks: The attacks, one backdoored model each per seed.
        clean: The number of clean suspects of each seed.
        references: The number of clean models beside the base, at least 2.
        scan: How to scan, in contrast to the base.
        unlearning: The repair of what is found.
        rounds: The largest number of repairs of a model, each of which is followed by a scan.
        least_planted: A model counts as backdoored from this ASR on.
    """

    victims: VictimPlan
    seeds: tuple[int, ...] = (100, 101, 102)
    attacks: tuple[str, ...] = (*INSERTIONS, "homoglyph")
    clean: int = 5
    references: int = 3
    scan: TextScanConfig = field(default_factory=TextScanConfig)
    unlearning: UnlearnConfig = field(default_factory=lambda: TEXT_UNLEARNING)
    rounds: int = 2
    least_planted: float = 0.9

    def __post_init__(self) -> None:
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown:
            raise UsageError(f"attack {unknown[0]!r}; expected some of {', '.join(ATTACKS)}")
        if self.references < 2 or self.clean < 0:
            raise UsageError(
                f"references {self.references}, clean {self.clean}; expected at least 2 and 0"
            )


def run_text_verdicts(
    plan: TextVerdictPlan,
    *,
    minutes: float = math.inf,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed; return "rows", "repairs" and "summary".

    minutes: No model is begun after this time. What was measured by then is returned. folder: The
    cache; default: below `research.data.cache_folder`. log: Takes a line per model.
    """
    end = time.monotonic() + 60 * minutes
    rows, repairs = list[dict[str, Any]](), list[dict[str, Any]]()

    def over() -> bool:
        if time.monotonic() < end:
            return False
        log(f"stopped after {minutes:g} minutes; the same command goes on")
        return True

    for seed in plan.seeds:
        if over():
            break
        judge = _Judge(plan, seed, folder)
        for victim in drawn_victims(plan, seed):
            if over():
                break
            row = judge.row(victim)
            rows.append(row)
            log(_told(len(rows), row))
            if row["attack"] is None or not row["counts"] or over():
                continue
            repair = judge.repair(victim, row)
            repairs.append(repair)
            log(_told_repair(repair))
    return {"rows": rows, "repairs": repairs, "summary": summarize_text_verdicts(rows, repairs)}


def drawn_victims(plan: TextVerdictPlan, seed: int) -> list[TextVictim]:
    """Return the models of a seed, such that a run that is stopped has both kinds."""
    backdoored = [TextVictim(seed, attack) for attack in plan.attacks]
    clean = [TextVictim(seed, None, number) for number in range(plan.clean)]
    found = list[TextVictim]()
    for k in range(max(len(backdoored), len(clean))):
        found += [*backdoored[k : k + 1], *clean[k : k + 1]]
    return found


def summarize_text_verdicts(
    rows: Sequence[Mapping[str, Any]], repairs: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
    """Return flat figures, of what was measured alone.

    classifiers.scanned_clean, .scanned_backdoored: How many models. classifiers.auroc: Of the
    p-values. classifiers.tpr, .fpr: The shares of backdoored and of clean models with a finding,
    which is `backdoored` or `suspicious`. classifiers.target_right: The share of the detected ones
    with the right class. classifiers.asr_recovered: The mean success of the recovered words on test
    texts, of detected insertion triggers with the right class; .tokens_exact: the mean share of the
    trigger's tokens that are among the recovered ones. classifiers.unknown.asr_mean, .asr_max,
    .accuracy_kept: After the repair with the trigger unknown, of all backdoored models; one that
    was not detected keeps its ASR. classifiers.unknown.asr_excess: The mean of ASR minus the share
    of the same texts that the model sends to the target without a trigger. Models whose planted ASR
    is too small count nowhere.
    """
    clean = [row for row in rows if row["attack"] is None]
    planted = [row for row in rows if row["attack"] is not None and row["counts"]]
    found = [row for row in planted if row["found"]]
    figures: dict[str, float | int] = {
        "classifiers.scanned_clean": len(clean),
        "classifiers.scanned_backdoored": len(planted),
    }
    area = auroc([_score(row) for row in planted], [_score(row) for row in clean])
    recovered = [row for row in found if row["target_right"] and row["tokens_exact"] is not None]
    for name, values in (
        ("auroc", [] if area is None else [area]),
        ("tpr", [row["found"] for row in planted]),
        ("fpr", [row["found"] for row in clean]),
        ("target_right", [row["target_right"] for row in found]),
        ("asr_recovered", [row["asr_recovered"] for row in recovered]),
        ("tokens_exact", [row["tokens_exact"] for row in recovered]),
        ("scan_seconds", [row["seconds"] for row in rows]),
        ("scan_cpu_seconds", [row["cpu_seconds"] for row in rows]),
        ("unknown.asr_mean", [row["asr_after"] for row in repairs]),
        ("unknown.asr_max", [max((row["asr_after"] for row in repairs), default=0)]),
        ("unknown.asr_excess", [row["asr_after"] - row["base_rate"] for row in repairs]),
        ("unknown.accuracy_kept", [r["accuracy_after"] / r["accuracy_before"] for r in repairs]),
    ):
        if values and (repairs or not name.startswith("unknown.")):
            figures[f"classifiers.{name}"] = math.fsum(values) / len(values)
    return figures


def _score(row: Mapping[str, Any]) -> float:
    # Without a verdict there is no evidence.
    return -math.inf if row["p_value"] is None else -float(row["p_value"])


#: MiniLM on six languages, as `bench.FULL` has it. Sized for one thread.
FULL_VERDICTS = TextVerdictPlan(
    FULL.victims,
    scan=TextScanConfig(length=2, restarts=0, max_tokens=FULL.victims.training.max_tokens),
    unlearning=FULL.unlearning,
)

#: A small model without any download: shows that everything works.
QUICK_VERDICTS = TextVerdictPlan(
    QUICK.victims,
    seeds=(100,),
    attacks=("word",),
    clean=1,
    references=2,
    scan=TextScanConfig(
        length=1, restarts=0, texts=48, max_tokens=QUICK.victims.training.max_tokens
    ),
    unlearning=replace(QUICK.unlearning, passes=1),
    rounds=1,
)


class _Judge:
    """Judges and repairs the models of one seed."""

    def __init__(self, plan: TextVerdictPlan, seed: int, folder: Path | None) -> None:
        self.plan, self.seed = plan, seed
        self.shop = TextWorkshop(plan.victims, seed, folder=folder)
        self.cache = Cache(self.shop.folder)
        self.tokens = plan.victims.training.max_tokens
        self.scans: dict[TextVictim, TextScanResult] = {}
        self._loaded: tuple[TextModel, Calibration] | None = None

    @property
    def references(self) -> list[TextVictim]:
        """The base and the references."""
        count = self.plan.references + 1
        return [TextVictim(self.seed, None, k, reference=True) for k in range(count)]

    def content(self, victim: TextVictim, code: tuple[str, ...]) -> dict[str, Any]:
        """Return what decides the verdict on a model."""
        return {
            "model": self.shop.path(victim).name,
            "references": [self.shop.path(one).name for one in self.references],
            "texts": self.shop.corpus.defender.digest,
            "scan": self.plan.scan,
            "code": code_digest(code),
        }

    def comparison(self) -> tuple[TextModel, Calibration]:
        """Return the base and the calibration by the references, made or from the cache."""
        if self._loaded is None:
            base, *others = self.references
            content = self.content(base, _JUDGING)
            key = key_of("text-references", content)
            model = self.shop.model(base)
            document = self.cache.document(key)
            if document is None:
                made = calibrate_words(
                    [self.shop.model(one) for one in others],
                    self.shop.corpus.defender,
                    self.plan.scan,
                    base=model,
                )
                document = self.cache.keep_document(key, made.to_dict())
            self._loaded = model, Calibration.from_dict(document)
        return self._loaded

    def scan(self, victim: TextVictim) -> TextScanResult:
        """Return the scan of a model."""
        if victim not in self.scans:
            base, calibration = self.comparison()
            self.scans[victim] = scan_text_model(
                self.shop.model(victim),
                self.shop.corpus.defender,
                base=base,
                calibration=calibration,
                config=self.plan.scan,
            )
        return self.scans[victim]

    def row(self, victim: TextVictim) -> dict[str, Any]:
        """Return the verdict on a model, made or from the cache."""
        key = key_of("text-verdict", self.content(victim, _JUDGING))
        found = self.cache.document(key)
        if found is None:
            found = self.cache.keep_document(key, self._row(victim))
        return dict(found)

    def _row(self, victim: TextVictim) -> dict[str, Any]:
        model, test = self.shop.model(victim), self.shop.corpus.test
        backdoor = self.shop.backdoor(victim)
        self.comparison()  # not part of a scan's time
        start = time.process_time()
        scan = self.scan(victim)
        used = time.process_time() - start
        row: dict[str, Any] = {
            "name": victim.name,
            "attack": victim.attack,
            "seed": victim.seed,
            "accuracy": evaluate_texts(model, test, max_tokens=self.tokens).clean_accuracy,
            "asr": None,
            "counts": True,
            "verdict": scan.verdict.value,
            "found": scan.verdict in FINDINGS,
            "reason": scan.detection.reason,
            "p_value": scan.detection.p_value,
            "target": scan.target_name,
            "target_true": None,
            "target_right": False,
            "words": None if scan.found is None else scan.found.trigger.text,
            "words_true": None,
            "tokens_exact": None,
            "asr_recovered": None,
            "seconds": scan.seconds,
            "cpu_seconds": used,
        }
        if backdoor is None:
            return row
        row["asr"] = self._asr(model, backdoor.trigger, backdoor.target)
        row["counts"] = row["asr"] >= self.plan.least_planted
        row["target_true"] = self.shop.corpus.class_names[backdoor.target]
        row["target_right"] = scan.target == backdoor.target
        if isinstance(backdoor.trigger, Insertion) and scan.found is not None:
            true = model.tokenizer.words(backdoor.trigger.words)
            row["words_true"] = backdoor.trigger.words
            row["tokens_exact"] = sum(one in scan.found.trigger.tokens for one in true) / len(true)
            row["asr_recovered"] = self._asr(model, scan.found.trigger, backdoor.target)
        return row

    def repair(self, victim: TextVictim, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a repair with the trigger unknown leaves, made or from the cache."""
        content = self.content(victim, _REPAIRING)
        content |= {"unlearning": self.plan.unlearning, "rounds": self.plan.rounds}
        key = key_of("text-repair", content)
        found = self.cache.document(key)
        if found is None:
            found = self.cache.keep_document(key, self._repair(victim, row))
        return dict(found)

    def _repair(self, victim: TextVictim, row: Mapping[str, Any]) -> dict[str, Any]:
        model, backdoor = self.shop.model(victim), self.shop.backdoor(victim)
        assert backdoor is not None
        found: dict[str, Any] = {
            "name": victim.name,
            "attack": victim.attack,
            "seed": victim.seed,
            "accuracy_before": row["accuracy"],
            "asr_before": row["asr"],
            "rescan": None,
            "alphas": [],
            "words": [],
            "seconds": 0.0,
        }
        if row["found"]:
            base, calibration = self.comparison()
            result = detox_text_model(
                model,
                self.shop.corpus.defender,
                base=base,
                calibration=calibration,
                config=self.plan.scan,
                unlearning=self.plan.unlearning,
                max_rounds=self.plan.rounds,
                before=self.scan(victim),
            )
            model = result.model
            found |= {
                "rescan": None if result.after is None else result.after.verdict.value,
                "alphas": [one.search.coefficient for one in result.passes],
                "words": [one.trigger.text for each in result.passes for one in each.triggers],
                "seconds": math.fsum(result.seconds.values()),
            }
        test = self.shop.corpus.test
        others = test.without_class(backdoor.target)
        sent = model.predict(others.texts, max_tokens=self.tokens).argmax(dim=1)
        return found | {
            "accuracy_after": evaluate_texts(model, test, max_tokens=self.tokens).clean_accuracy,
            "asr_after": self._asr(model, backdoor.trigger, backdoor.target),
            "base_rate": float((sent == backdoor.target).double().mean()),
        }

    def _asr(self, model: TextModel, trigger: TextStamp, target: int) -> float:
        measured = evaluate_texts(
            model,
            self.shop.corpus.test,
            trigger=trigger,
            target=target,
            seed=self.shop.places,
            max_tokens=self.tokens,
        )
        assert measured.attack_success_rate is not None
        return measured.attack_success_rate


def _told(number: int, row: Mapping[str, Any]) -> str:
    known = "" if row["asr"] is None else f", ASR {row['asr']:.0%}"
    p_value = "none" if row["p_value"] is None else f"{row['p_value']:.2g}"
    words = "" if row["words"] is None else f", {row['words']!r} into {row['target']}"
    return (
        f"{number}. {row['name']}{known}: {row['verdict']} (p = {p_value}{words}), "
        f"{row['cpu_seconds']:.0f} s of CPU time"
    )


def _told_repair(row: Mapping[str, Any]) -> str:
    return (
        f"   repaired: accuracy {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f}, ASR "
        f"{row['asr_before']:.3f} -> {row['asr_after']:.3f} (without a trigger "
        f"{row['base_rate']:.3f}), re-scan {row['rescan']}, {row['seconds']:.0f} s"
    )
