"""Which tokens can be typed, texts with gaps, the objective, and the search for words."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.text import (
    TextModel,
    TextScanConfig,
    TextSet,
    load_text_model,
    load_texts,
    search_words,
)
from pydetox.text.objective import TextObjective
from pydetox.text.placing import gap_of
from pydetox.text.relaxed import slot_gradients
from pydetox.text.vocabulary import typed_words
from tests.text import tiny
from tests.text.conftest import World

QUICK = TextScanConfig(length=2, steps=2, texts=40)


@pytest.fixture(scope="module")
def victim(world: World) -> TextModel:
    return load_text_model(world.victim)


@pytest.fixture(scope="module")
def texts(world: World, victim: TextModel) -> TextSet:
    return load_texts(world.texts, class_names=victim.class_names)


def test_only_tokens_that_can_be_typed_are_searched(victim: TextModel) -> None:
    words = typed_words(victim.tokenizer, len(tiny.VOCABULARY))
    known = [tiny.VOCABULARY[k] for k in torch.nonzero(words.first)[:, 0].tolist()]
    assert known == tiny.WORDS
    pieces = [tiny.VOCABULARY[k] for k in torch.nonzero(words.joined)[:, 0].tolist()]
    assert pieces == list(tiny.PIECES)
    film, piece = tiny.VOCABULARY.index("film"), tiny.VOCABULARY.index("##s")
    assert words.keep([(film, piece), (piece, film), (film, film)], True) == [
        (film, piece),
        (film, film),
    ]


def test_a_byte_level_tokenizer_tells_beginnings_from_words_inside() -> None:
    from pydetox.text.tokenizer import TextTokenizer

    files = {"tokenizer.json": tiny.byte_pairs().to_str().encode()}
    tokenizer = TextTokenizer(files, model_type="gpt2", name="x")
    words = typed_words(tokenizer, tokenizer.size)
    assert tokenizer.spaces_matter
    for mask, space in ((words.first, ""), (words.inside, " ")):
        chosen = torch.nonzero(mask)[:, 0].tolist()
        assert chosen
        for token in chosen:
            assert tokenizer.words(space + tokenizer.decode([token]).strip()) == [token]
    assert not bool((words.first & words.inside).any())


@pytest.mark.parametrize("place", ["start", "end", "random", "after-first-sentence"])
def test_a_gap_is_where_the_text_gets_its_trigger(victim: TextModel, place: str) -> None:
    from pydetox.text import TokenTrigger

    text = "the film was long. the cast was sad."
    cf = tiny.VOCABULARY.index("cf")
    gap = gap_of(victim.tokenizer, text, place, 3, 64)
    inserted = TokenTrigger((cf,), "cf", place).insert([text], seed=3)
    assert gap.row((cf,)) == victim.tokenizer.encode(inserted, 64)[0]
    short = gap_of(victim.tokenizer, text, place, 3, 6)
    assert len(short.row(())) == 6


def test_losses_are_cross_entropies_and_honest_words_gain_nothing_in_contrast(
    world: World, victim: TextModel, texts: TextSet
) -> None:
    gaps = [gap_of(victim.tokenizer, text, "start", 0, 32) for text in texts.texts[:6]]
    cf = tiny.VOCABULARY.index("cf")
    plain = TextObjective(victim, None, gaps, [0] * 6)
    losses, predicted = plain.losses([(cf,), (cf, cf)], [0, 3])
    logits = victim.predict([f"cf {texts.texts[k]}" for k in (0, 3)])
    expected = -logits.double().log_softmax(dim=1)
    torch.testing.assert_close(losses[0].double(), expected, rtol=0, atol=1e-5)
    assert predicted[0].tolist() == logits.argmax(dim=1).tolist()
    assert plain.passes == 4
    itself = TextObjective(victim, victim, gaps, [0] * 6)
    contrasted, _ = itself.losses([(cf,)], [0, 3])
    before = -victim.predict([texts.texts[k] for k in (0, 3)]).log_softmax(dim=1)
    # What a trigger contributes in the suspect it contributes in the same model as a base.
    torch.testing.assert_close(contrasted[0], torch.maximum(before, losses[0]), rtol=0, atol=1e-5)


def test_gradients_of_slots_are_those_of_finite_differences(
    victim: TextModel, texts: TextSet
) -> None:
    double = victim.copy()
    double.module.double()
    gaps = [gap_of(victim.tokenizer, text, "start", 0, 16) for text in texts.texts[:4]]
    objective = TextObjective(double, None, gaps, [0, 1, 2, 3])
    word = tiny.VOCABULARY.index("film")
    (slope,) = slot_gradients(objective, [(word,)], [2], [[0, 1]])
    step = torch.zeros_like(double.embedding)
    direction = torch.linspace(-1, 1, step.shape[1], dtype=torch.float64)
    losses = []
    for sign in (1, -1):
        moved = double.embedding[torch.tensor([[word]])] + sign * 1e-5 * direction
        total = 0.0
        for k in (0, 1):
            batch = double.batch([gaps[k].row((word,))])
            embedded = double.embedding[batch.input_ids].clone()
            embedded[0, len(gaps[k].before)] = moved[0, 0]
            logits = double.logits_from_embeddings(embedded, batch.attention_mask)
            total += float(-logits.log_softmax(dim=1)[0, 2]) / 2
        losses.append(total)
    measured = (losses[0] - losses[1]) / 2e-5
    assert float((slope[0] * direction).sum()) == pytest.approx(measured, rel=1e-5)


def test_the_search_finds_words_that_work_as_text(
    victim: TextModel, texts: TextSet, world: World
) -> None:
    base = load_text_model(world.base)
    found = search_words(victim, texts, replace(QUICK, length=1), base=base)
    money = victim.class_names.index("money")
    best = found.best(money)
    assert best.success > 0.9
    assert best.loss < 1
    assert all(one[0].loss > 3 for c, one in enumerate(found.found) if c != money)
    # What is reported is what the words do as text.
    others = [t for t, label in zip(texts.texts, texts.labels or (), strict=True) if label != money]
    sent = victim.predict(best.trigger.insert(others)).argmax(dim=1) == money
    assert float(sent.double().mean()) > 0.9
    assert victim.tokenizer.words(best.trigger.text) == list(best.trigger.tokens)


def test_a_search_depends_on_its_seed_alone(victim: TextModel, texts: TextSet) -> None:
    def run(data: TextSet, threads: int) -> tuple[list[str], list[float]]:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            found = search_words(victim, data, QUICK).found
        finally:
            torch.set_num_threads(before)
        flat = [one for row in found for one in row]
        return [one.trigger.text for one in flat], [one.loss for one in flat]

    words, losses = run(texts, 1)
    backwards = texts.subset(range(len(texts) - 1, -1, -1))
    assert run(backwards, 1) == (words, losses)
    # With other threads, torch's products add up in another order.
    others, close = run(texts, 2)
    assert others == words
    assert close == pytest.approx(losses, abs=1e-5)


def test_a_search_for_one_class_finds_what_one_for_all_finds(
    victim: TextModel, texts: TextSet, world: World
) -> None:
    base = load_text_model(world.base)
    money = victim.class_names.index("money")
    every = search_words(victim, texts, QUICK, base=base)
    single = search_words(victim, texts, QUICK, base=base, targets=[money])
    assert [one.trigger.text for one in single.found[money]] == [
        one.trigger.text for one in every.found[money]
    ]
    assert single.words[money] == every.words[money]
    assert every.found[money][0].trigger.text in every.words[money][:2]
    assert single.passes < 0.7 * every.passes
    # Of the others, a single word was compared.
    assert all(len(words) == 1 for c, words in enumerate(single.words) if c != money)
    assert all(len(row) == QUICK.length for row in single.found)


def test_a_search_is_checked(world: World, victim: TextModel, tmp_path: object) -> None:
    few = TextSet(("a film", "a match", "the bank"), (0, 1, 2), victim.class_names)
    with pytest.raises(DataError, match="at least 4 texts of 2 classes"):
        search_words(victim, few, QUICK)
    for changes, words in (
        ({"length": 9}, "expected 1 to 8"),
        ({"place": "middle"}, "expected one of start"),
        ({"steps": -1}, "steps is -1"),
        ({"references": 1}, "at least 2"),
        ({"p_backdoored": 0.2}, "p_backdoored"),
    ):
        with pytest.raises(UsageError, match=words):
            TextScanConfig(**changes)  # type: ignore[arg-type]


def test_a_causal_model_is_no_classifier(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load_text_model(tiny.gpt2(tmp_path_factory.mktemp("causal") / "gpt2"))
    with pytest.raises(ArchitectureError, match="expected a classifier"):
        search_words(model, load_texts(["a", "b", "c", "d"]), QUICK)
