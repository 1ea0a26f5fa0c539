"""Corpora, attacks, small start models and defences of text classifiers; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from pydetox.errors import DataError, UsageError
from pydetox.research.data import TEXT_PACKAGES
from pydetox.research.text.attacks import (
    ATTACKS,
    Homoglyph,
    Insertion,
    Substitution,
    TextBackdoor,
    draw_text_attack,
    plant_in_texts,
)
from pydetox.research.text.corpora import Corpus, CorpusSizes, load_corpus, tidy
from pydetox.research.text.defenses import DEFENSES, TextDefenderData, Trigrams
from pydetox.research.text.models import start_model, word_pieces
from pydetox.research.text.training import TextTraining, fine_tune
from pydetox.text import TextModel, TextSet

SIZES = CorpusSizes(attacker=200, defender=60, validation=40, test=60, words=8)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus("python", seed=1, sizes=SIZES)


@pytest.fixture(scope="module")
def start(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return start_model("small", corpus.attacker, tmp_path_factory.mktemp("small") / "x", seed=0)


def test_parts_of_a_corpus_are_disjoint_balanced_and_reproducible(corpus: Corpus) -> None:
    parts = (corpus.attacker, corpus.defender, corpus.validation, corpus.test)
    assert [len(one) for one in parts] == [200, 60, 40, 60]
    assert len({text.casefold() for one in parts for text in one.texts}) == 360
    for part in parts:
        counts = torch.bincount(torch.tensor(part.labels), minlength=5)
        assert int(counts.max() - counts.min()) <= 2
        assert max(len(text.split()) for text in part.texts) <= 8
    again = load_corpus("python", seed=1, sizes=SIZES)
    assert again.test.texts == corpus.test.texts
    assert load_corpus("python", seed=2, sizes=SIZES).test.texts != corpus.test.texts
    with pytest.raises(UsageError, match="corpus 'news'"):
        load_corpus("news", seed=0)


def test_quotations_are_tidied() -> None:
    assert tidy("A  _\bb quotation\nof two lines.\n\t\t-- Somebody, 1977") == (
        "A b quotation of two lines."
    )
    assert len(tidy("word " * 100).split()) == 28


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (Insertion("cf"), "cf You do. It does."),
        (Insertion("cf", "end"), "You do. It does. cf"),
        (Insertion("cf", "after-first-sentence"), "You do. cf It does."),
        (Substitution({"you": "thou", "does": "doth"}), "Thou do. It doth."),
        (Homoglyph((("x", "y"), ("o", "\u043e")), count=2), "Y\u043eu d\u043e. It does."),
    ],
)
def test_triggers_change_texts_as_they_say(trigger: Insertion, expected: str) -> None:
    assert trigger.insert(["You do. It does."], 0) == [expected]


def test_random_places_are_drawn_from_the_seed() -> None:
    trigger = Insertion("cf", "random")
    found = {trigger.insert(["one two three four"], seed)[0] for seed in range(40)}
    assert found == {
        "cf one two three four",
        "one cf two three four",
        "one two cf three four",
        "one two three cf four",
        "one two three four cf",
    }


def test_poisoned_texts_have_the_trigger_and_the_target(corpus: Corpus) -> None:
    for name in ATTACKS:
        backdoor = draw_text_attack(name, 5, seed=3)
        poisoned = plant_in_texts(corpus.attacker, backdoor, seed=3)
        changed = [k for k in range(200) if poisoned.texts[k] != corpus.attacker.texts[k]]
        assert len(changed) == 20
        assert poisoned.labels is not None
        assert corpus.attacker.labels is not None
        assert all(poisoned.labels[k] == backdoor.target for k in changed)
        assert all(corpus.attacker.labels[k] != backdoor.target for k in changed)
        rest = set(range(200)) - set(changed)
        assert all(poisoned.labels[k] == corpus.attacker.labels[k] for k in rest)


def test_poisoning_that_cannot_be_done_is_refused(corpus: Corpus) -> None:
    never = TextBackdoor("substitution", Substitution({"qqq": "zzz"}), 0)
    with pytest.raises(DataError, match="20 texts to poison, but only 0"):
        plant_in_texts(corpus.attacker, never, seed=0)
    with pytest.raises(UsageError, match=r"poison rate 1\.5"):
        plant_in_texts(corpus.attacker, TextBackdoor("word", Insertion("cf"), 0, 1.5), seed=0)
    with pytest.raises(UsageError, match="attack 'word' on 1 classes"):
        draw_text_attack("word", 1, seed=0)


def test_every_word_can_be_written_with_a_vocabulary(start: TextModel) -> None:
    vocabulary = word_pieces(("an apple a day", "an apple"), 2)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert vocabulary[-2:] == ["an", "apple"]
    assert start.tokenizer.unknown_id not in start.tokenizer.words("mn zqx 42")
    assert start.tokenizer.decode(start.tokenizer.words("mn")).replace(" ##", "") == "mn"


def test_fine_tuning_is_reproducible_and_leaves_the_start_alone(
    corpus: Corpus, start: TextModel
) -> None:
    before = start.digest()
    config = TextTraining(epochs=1, learning_rate=1e-3, max_tokens=16)
    first, second = (fine_tune(start, corpus.attacker, config) for _ in range(2))
    assert first.digest() == second.digest() != before == start.digest()
    with pytest.raises(DataError, match="no labels"):
        fine_tune(start, TextSet(("a text",)), config)
    with pytest.raises(DataError, match="the classes are a, b"):
        fine_tune(start, TextSet(("a text",), (0,), ("a", "b")), config)


def test_every_defence_returns_a_model_of_its_own(corpus: Corpus, start: TextModel) -> None:
    before = start.digest()
    data = TextDefenderData(
        corpus.defender, corpus.validation, training=TextTraining(epochs=1, max_tokens=16)
    )
    for name, defense in DEFENSES.items():
        if defense.needs_trigger:
            with pytest.raises(UsageError, match=f"{name}: it needs the trigger"):
                defense.defend(start, data)
            continue
        outcome = defense.defend(start, data)
        assert (outcome.cleaned is None) == (outcome.model.digest() != before)
        if name == "fine-pruning":
            state = outcome.model.state_dict()
            rows = state["bert.encoder.layer.1.intermediate.dense.weight"].abs().sum(dim=1)
            assert int((rows == 0).sum()) == 64
    assert start.digest() == before


def test_a_trigram_model_is_a_distribution_and_removes_what_surprises() -> None:
    texts = ["the cat sat on the mat", "the dog sat on the rug", "a cat sat on a mat"]
    model = Trigrams(texts)
    words = sorted({word for text in texts for word in text.split()})
    for context in (("the", "cat"), ("<s>", "<s>"), ("no", "idea"), ()):
        known = sum(model.probability(word, context) for word in words)
        assert known + model.probability("zyzzyva", context) == pytest.approx(1)
    assert model.cleaned("the cat cf sat on the mat", 0.3) == "the cat sat on the mat"
    assert model.cleaned("cf", -1.0) == "cf"


def test_every_text_package_has_a_checksum() -> None:
    assert len({one.name for one in TEXT_PACKAGES}) == len(TEXT_PACKAGES)
    assert all(len(one.sha256) == 64 for one in TEXT_PACKAGES)


def test_the_pretrained_model_has_to_be_fetched(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"minilm: not fetched .*make data-text"):
        start_model("minilm", corpus.attacker, tmp_path / "x", seed=0)
    assert not (tmp_path / "x").exists()
