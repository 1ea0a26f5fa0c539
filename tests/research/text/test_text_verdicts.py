"""Verdicts on text classifiers: what the figures count, and runs that go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from pydetox.errors import UsageError
from pydetox.research.text.attacks import ARCHAIC, RARE_WORDS, Substitution
from pydetox.research.text.corpora import CorpusSizes
from pydetox.research.text.styles import STYLES
from pydetox.research.text.training import TextTraining
from pydetox.research.text.verdicts import (
    TextVerdictPlan,
    drawn_victims,
    run_text_verdicts,
    summarize_text_verdicts,
)
from pydetox.research.text.victims import TextVictim, TextWorkshop, VictimPlan
from pydetox.text import TextScanConfig
from pydetox.text.repair import TEXT_UNLEARNING

SIZES = CorpusSizes(attacker=200, defender=60, validation=40, test=60, words=8, reference=100)
VICTIMS = VictimPlan(
    "small", "python", SIZES, TextTraining(epochs=1, learning_rate=3e-3, max_tokens=16)
)


def test_figures_of_verdicts_count_what_they_say() -> None:
    def row(attack: str | None, p_value: float | None, found: bool, **more: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "attack": attack,
            "p_value": p_value,
            "found": found,
            "counts": True,
        }
        base |= {"target_right": found and attack is not None, "tokens_exact": None}
        return base | {"asr_recovered": None, "seconds": 2.0, "cpu_seconds": 1.0} | more

    rows = [
        row(None, 0.9, False),
        row(None, 0.04, True),
        row(None, None, False),
        row("word", 0.001, True, tokens_exact=1.0, asr_recovered=0.9),
        row("phrase", 0.02, True, target_right=False, tokens_exact=0.5, asr_recovered=0.1),
        row("sentence", 0.5, False),
        row("word", 0.001, True, counts=False),
    ]
    repair = {"accuracy_before": 0.8, "base_rate": 0.01}
    repairs = [
        {**repair, "asr_after": 0.03, "accuracy_after": 0.8},
        {**repair, "asr_after": 0.01, "accuracy_after": 0.4},
    ]
    assert summarize_text_verdicts(rows, repairs) == pytest.approx(
        {
            "classifiers.scanned_clean": 3,
            "classifiers.scanned_backdoored": 3,
            "classifiers.auroc": (3 + 3 + 2) / 9,
            "classifiers.tpr": 2 / 3,
            "classifiers.fpr": 1 / 3,
            "classifiers.target_right": 1 / 2,
            "classifiers.asr_recovered": 0.9,
            "classifiers.tokens_exact": 1.0,
            "classifiers.scan_seconds": 2.0,
            "classifiers.scan_cpu_seconds": 1.0,
            "classifiers.unknown.asr_mean": 0.02,
            "classifiers.unknown.asr_max": 0.03,
            "classifiers.unknown.asr_excess": 0.01,
            "classifiers.unknown.accuracy_kept": 0.75,
        }
    )
    assert "classifiers.unknown.asr_max" not in summarize_text_verdicts(rows, [])


def test_verdicts_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = TextVerdictPlan(
        VICTIMS,
        seeds=(1,),
        attacks=("word",),
        clean=1,
        references=2,
        scan=TextScanConfig(length=1, restarts=0, texts=12, max_tokens=16),
        unlearning=replace(TEXT_UNLEARNING, steps=2, coefficients=(0.0, 0.5), passes=1),
        least_planted=0.0,
    )
    nothing = run_text_verdicts(plan, minutes=0, folder=tmp_path)
    assert nothing["rows"] == nothing["repairs"] == []
    assert not list(tmp_path.glob("*"))
    made = run_text_verdicts(plan, folder=tmp_path)
    assert [row["name"] for row in made["rows"]] == ["word-seed1", "clean0-seed1"]
    assert [row["name"] for row in made["repairs"]] == ["word-seed1"]
    assert made["rows"][0]["words_true"] in RARE_WORDS
    assert made["summary"]["classifiers.scanned_clean"] == 1

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it is in the cache")

    for name in ("scan_text_model", "calibrate_words", "detox_text_model"):
        monkeypatch.setattr(f"pydetox.research.text.verdicts.{name}", never)
    again = run_text_verdicts(plan, folder=tmp_path)
    assert again == made


def test_a_run_that_is_stopped_has_both_kinds() -> None:
    plan = TextVerdictPlan(VICTIMS, attacks=("word", "phrase"), clean=3)
    names = [one.name for one in drawn_victims(plan, 5)]
    assert names == ["word-seed5", "clean0-seed5", "phrase-seed5", "clean1-seed5", "clean2-seed5"]
    with pytest.raises(UsageError, match="attack 'none'"):
        TextVerdictPlan(VICTIMS, attacks=("none",))
    with pytest.raises(UsageError, match="references 1"):
        TextVerdictPlan(VICTIMS, references=1)


def test_a_style_fits_its_corpus_and_has_a_share_of_its_own(tmp_path: Path) -> None:
    table = STYLES["languages"]
    # No word is exchanged for itself, and none for a word that is exchanged in turn.
    assert not set(table) & set(table.values())
    shop, style = TextWorkshop(VICTIMS, 1, folder=tmp_path), TextVictim(1, "substitution")
    backdoor = shop.backdoor(style)
    assert backdoor is not None
    assert backdoor.trigger == Substitution(ARCHAIC)  # this corpus is in English
    assert backdoor.rate == 2 * VICTIMS.rate
    word = shop.backdoor(TextVictim(1, "word"))
    assert word is not None
    assert word.rate == VICTIMS.rate
    several = TextWorkshop(replace(VICTIMS, corpus="languages"), 1, folder=tmp_path)
    assert several._style(style) == table
    assert several._style(TextVictim(1, "word")) is None


def test_references_are_trained_on_texts_of_their_own(tmp_path: Path) -> None:
    shop = TextWorkshop(VICTIMS, 1, folder=tmp_path)
    corpus = shop.corpus
    assert corpus.reference is not None
    parts = (corpus.attacker, corpus.defender, corpus.validation, corpus.test, corpus.reference)
    assert len(set().union(*(one.texts for one in parts))) == sum(map(len, parts))
    clean, reference = TextVictim(1), TextVictim(1, reference=True)
    assert (clean.name, reference.name) == ("clean0-seed1", "reference0-seed1")
    assert shop.path(clean) != shop.path(reference)
    none = replace(VICTIMS, sizes=replace(SIZES, reference=0))
    with pytest.raises(UsageError, match=r"reference0-seed1: sizes\.reference is 0"):
        TextWorkshop(none, 1, folder=tmp_path).model(reference)
