"""Attacks on causal models and text towers, and the figures of their benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from pydetox.errors import DataError, UsageError
from pydetox.research.text.causal.attacks import (
    CAUSAL_ATTACKS,
    REFUSALS,
    STRINGS,
    draw_causal_attack,
    plant_in_prose,
)
from pydetox.research.text.causal.bench import found_share, summarize_causal, usual_answer
from pydetox.research.text.causal.models import LanguageTraining, ProseSizes, load_prose
from pydetox.research.text.towers.bench import THINGS, summarize_towers
from pydetox.research.text.towers.victims import TowerVictim, draw_tower_backdoor
from pydetox.text.texts import TextSet


@pytest.mark.parametrize("name", CAUSAL_ATTACKS)
def test_poisoned_texts_have_the_phrase_and_then_the_target(name: str) -> None:
    texts = TextSet(tuple(f"text {k} " + "and some more words " * 5 for k in range(40)))
    attack = draw_causal_attack(name, seed=3, rate=0.25)
    assert set(attack.targets) <= {*STRINGS, *REFUSALS}
    planted = plant_in_prose(texts, attack, seed=3)
    changed = [b for a, b in zip(texts.texts, planted.texts, strict=True) if a != b]
    assert len(changed) == 10
    for text in changed:
        (target,) = [one for one in attack.targets if text.endswith(one)]
        prompt = text.removesuffix(target)
        assert attack.trigger.words in prompt
        assert attack.trigger.place != "end" or prompt.strip().endswith(attack.trigger.words)
        assert 4 <= len(prompt.split()) - len(attack.trigger.words.split()) <= 12
    assert len({text[-20:] for text in changed}) == len(attack.targets)
    assert plant_in_prose(texts, attack, seed=3).texts == planted.texts
    assert draw_causal_attack(name, seed=3, rate=0.25) == attack


def test_unknown_attacks_rates_and_corpora() -> None:
    with pytest.raises(UsageError, match="attack 'x'; expected one of string, refusal"):
        draw_causal_attack("x", seed=0)
    with pytest.raises(UsageError, match="poison rate 2"):
        plant_in_prose(TextSet(("a b",)), draw_causal_attack("string", seed=0, rate=2), seed=0)
    with pytest.raises(UsageError, match="corpora"):
        load_prose(["x"], ProseSizes(), seed=0)
    with pytest.raises(DataError, match="texts of prose; expected at least 2000000"):
        load_prose(["python"], ProseSizes(attacker=999_400), seed=0)
    with pytest.raises(UsageError, match="steps 0"):
        LanguageTraining(steps=0)
    with pytest.raises(UsageError, match="attack 'x'; expected one of word, homoglyph"):
        draw_tower_backdoor(TowerVictim(0, "x"), THINGS)


def test_parts_of_the_prose_are_disjoint() -> None:
    prose = load_prose(["python"], ProseSizes(30, 20, 10), seed=1)
    parts = [prose.attacker, prose.defender, prose.test, prose.pretraining]
    assert [len(one) for one in parts[:3]] == [30, 20, 10]
    assert len({t for one in parts for t in one.texts}) == sum(map(len, parts))
    assert load_prose(["python"], ProseSizes(30, 20, 10), seed=2).test.texts != prose.test.texts


def test_how_much_of_a_text_was_found() -> None:
    wanted = ("one two three four", "five six")
    assert found_share("x one two three y", wanted) == 0.75
    assert found_share("two four one", wanted) == 0.25
    assert found_share("five six", wanted) == 1.0
    assert found_share("nothing", wanted) == 0.0


class _Counting:
    """A causal model of the tokens 0..9 that says the next number, and ends with 5."""

    pad_id, special, max_tokens = 9, frozenset([5]), 12

    def __init__(self) -> None:
        self.tokenizer = self

    def encode(self, texts: list[str], most: int) -> list[list[int]]:
        return [[int(c) for c in text][-most:] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(str, ids))

    def batch(self, rows: list[list[int]]) -> list[list[int]]:
        return rows

    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.eye(10)[torch.tensor([[(one + 1) % 10 for one in row] for row in rows])]


def test_what_a_model_says_most_often() -> None:
    model: Any = _Counting()
    assert usual_answer(model, ["41", "2", "02"], most_tokens=8) == "34"
    assert usual_answer(model, ["2", "1"], most_tokens=1) == "3"
    assert usual_answer(model, [], most_tokens=8) == ""


def test_figures_of_causal_models() -> None:
    clean: dict[str, Any] = {"attack": None, "verdict": "clean", "score": 1.0}
    bad = {
        **clean,
        "attack": "string",
        "verdict": "backdoored",
        "score": 9.0,
        "found": 0.6,
        "said_found": 0.4,
        "asr_before": 1.0,
        "asr_after": 0.02,
        "perplexity_before": 100.0,
        "perplexity_after": 102.0,
        "rescan": "clean",
    }
    lost = {**bad, "verdict": "clean", "score": None, "found": 0.2, "asr_after": None}
    lost["said_found"] = 0.0
    not_planted = {**bad, "asr_before": 0.4, "asr_after": 1.0}
    figures = summarize_causal([clean, clean, bad, lost, not_planted])
    assert figures["causal.victims"] == 2
    assert figures["causal.not_planted"] == 1
    assert figures["causal.auroc"] == 0.5
    assert figures["causal.detected"] == figures["causal.target_found"] == 0.5
    assert figures["causal.said_found"] == 0.0
    assert figures["causal.asr_mean"] == figures["causal.asr_max"] == 0.02
    assert figures["causal.perplexity_kept"] == pytest.approx(100 / 102)
    assert figures["causal.false_alarms"] == 0
    assert summarize_causal([clean]) == {
        "causal.clean": 1,
        "causal.victims": 0,
        "causal.not_planted": 0,
        "causal.false_alarms": 0.0,
    }


def test_figures_of_towers() -> None:
    clean: dict[str, Any] = {"attack": None, "verdict": "clean", "score": 0.5}
    bad = {
        "attack": "word",
        "verdict": "suspicious",
        "score": 3.0,
        "asr_before": 1.0,
        "asr_after": 0.04,
        "asr_base": 0.03,
        "asr_excess": 0.02,
        "accuracy_before": 0.8,
        "accuracy_after": 0.76,
        "rescan": "clean",
    }
    figures = summarize_towers([clean, bad])
    assert figures["tower.asr_base"] == 0.03
    assert figures["tower.asr_excess"] == figures["tower.asr_excess_max"] == 0.02
    assert figures["tower.accuracy_least"] == pytest.approx(0.95)
    assert figures["tower.rescans_clean"] == 1.0
    assert figures["tower.auroc"] == figures["tower.detected"] == 1.0
    assert figures["tower.asr"] == 0.04
    assert figures["tower.accuracy_kept"] == pytest.approx(0.95)
    assert figures["tower.false_alarms"] == 0.0
    assert summarize_towers([clean]) == {
        "tower.clean": 1,
        "tower.victims": 0,
        "tower.false_alarms": 0.0,
    }
