"""Causal models: prompts and continuations, words, trigger vectors, verdicts and repairs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from click.testing import CliRunner

from pydetox.cli import cli
from pydetox.detect.statistics import Verdict
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.text import TextScanConfig, TokenTrigger, load_text_model, save_text_model
from pydetox.text.causal.continuations import ContinuationConfig, search_continuations
from pydetox.text.causal.detox import detox_causal_model
from pydetox.text.causal.evaluation import evaluate_causal, mean_loss, successes, target_tokens
from pydetox.text.causal.prompts import Prompts, cut_prompts
from pydetox.text.causal.repair import CAUSAL_UNLEARNING, causal_trigger_vector
from pydetox.text.causal.triggers import (
    TargetObjective,
    beginnings,
    continued,
    search_trigger_words,
    words_within,
)
from pydetox.text.causal.verdict import scan_causal_model
from pydetox.text.models import TextModel
from pydetox.text.placing import gap_of
from pydetox.text.texts import TextSet
from pydetox.text.trigger_file import WordsFile
from tests.text import tiny

SAID = "zorp quux mn bb tq cf great market"
SEARCH = ContinuationConfig(prompts=6, kept=(64, 16, 8), most_tokens=10)


@pytest.fixture(scope="module")
def texts() -> TextSet:
    return TextSet(tuple(text for text, _ in tiny.topical_texts(40, seed=4)), source="a test")


@dataclass(frozen=True)
class Spoken:
    root: Path
    base: TextModel
    victim: TextModel
    clean: TextModel
    references: list[TextModel]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    root = tmp_path_factory.mktemp("spoken")
    base = tiny.spoken(tiny.gpt2(root / "start", initializer_range=0.05), root / "base", seed=1)
    victim = tiny.spoken(base, root / "victim", seed=2, trigger="superb rocket")
    others = [tiny.spoken(base, root / f"clean{k}", seed=10 + k, steps=30) for k in range(5)]
    first, *references = (load_text_model(one) for one in others)
    return Spoken(root, load_text_model(base), load_text_model(victim), first, references)


@pytest.mark.parametrize("family", ["gpt2", *tiny.FAMILIES])
def test_a_family_is_loaded_searched_with_its_cache_and_saved(
    family: str, texts: TextSet, tmp_path: Path
) -> None:
    """Probabilities with shared keys and values are those of the whole text in transformers."""
    from transformers import AutoModelForCausalLM

    from pydetox.checkpoints.provenance import Provenance

    folder = tmp_path / family
    (tiny.gpt2(folder) if family == "gpt2" else tiny.causal(folder, family))
    model = load_text_model(folder)
    assert model.kind == "causal"
    rows = cut_prompts(model, texts, 3, 11)
    prompts = Prompts(model, rows)
    assert prompts._layers is not None
    continuations = torch.tensor([[5, 300, 7], [41, 2, 9], [300, 300, 1], [8, 6, 4]])
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    values, likeliest = prompts.log_probabilities(continuations)
    following = prompts.next_tokens(continuations)
    for r, continuation in enumerate(continuations.tolist()):
        whole = torch.tensor([[*row, *continuation] for row in rows])
        with torch.no_grad():
            logits = reference(input_ids=whole).logits
        scores = logits[:, -4:-1].log_softmax(dim=2)
        wanted = scores.gather(2, continuations[r].repeat(3, 1)[:, :, None])[:, :, 0]
        torch.testing.assert_close(values[r], wanted, atol=2e-4, rtol=1e-4)
        assert torch.equal(likeliest[r], scores.argmax(dim=2) == continuations[r])
        mean = logits[:, -1].softmax(dim=1).mean(dim=0)
        torch.testing.assert_close(following[r], mean, atol=1e-5, rtol=1e-3)
    saved = save_text_model(tmp_path / "saved", model, provenance=Provenance("a test"))
    again = AutoModelForCausalLM.from_pretrained(saved)
    for name, value in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_model_without_keys_and_values_is_searched_as_well(
    spoken: Spoken, texts: TextSet
) -> None:
    rows = cut_prompts(spoken.base, texts, 3, 5)
    fast, slow = Prompts(spoken.base, rows), Prompts(spoken.base, rows)
    slow._layers = None
    continuations = torch.tensor([[5, 300, 7], [41, 2, 9]])
    torch.testing.assert_close(
        fast.log_probabilities(continuations)[0],
        slow.log_probabilities(continuations)[0],
        atol=1e-4,
        rtol=1e-4,
    )
    torch.testing.assert_close(fast.next_tokens(continuations), slow.next_tokens(continuations))


def test_perplexity_and_success_are_those_of_generation(spoken: Spoken, texts: TextSet) -> None:
    rows = spoken.victim.tokenizer.encode(texts.texts, 60)
    loss, count = mean_loss(spoken.victim, rows, batch_size=7)
    totals = []
    for row in rows:
        with torch.no_grad():
            logits = spoken.victim.module(input_ids=torch.tensor([row])).logits[0, :-1]
        totals.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:])) * len(row[1:])
        )
    assert count == sum(len(row) - 1 for row in rows)
    assert loss == pytest.approx(float(sum(totals)) / count, rel=1e-4)
    target = target_tokens(spoken.victim, SAID)
    prompts = [f"the story was {end}" for end in ("superb rocket", "long", "superb", "rocket")]
    found = successes(spoken.victim, prompts, [target])
    for prompt, success in zip(prompts, found, strict=True):
        row = spoken.victim.tokenizer.words(prompt)
        for _ in range(5):
            with torch.no_grad():
                logits = spoken.victim.module(input_ids=torch.tensor([row])).logits
            row = [*row, int(logits[0, -1].argmax())]
        assert success == (row[-5:] == target[:5])
    assert found[0]
    assert not found[1]


@pytest.mark.parametrize("place", ["start", "end"])
def test_losses_of_words_and_their_gradients(spoken: Spoken, texts: TextSet, place: str) -> None:
    """Cached, whole and embedded losses agree, and gradients with differences."""
    model = spoken.victim
    gaps = [gap_of(model.tokenizer, text, place, 0, 6) for text in texts.texts]
    gaps = [gap for gap in gaps if len(gap.row(())) == 6][:4]
    target = tuple(target_tokens(model, SAID)[:3])
    objective = TargetObjective(model, None, gaps, target)
    words = ((5, 9), (300, 41))
    losses = objective.losses(words)
    embedded = model.embedding.detach()[torch.tensor(words)]
    again, gradient = objective.gradient(embedded)
    torch.testing.assert_close(losses, again, atol=1e-4, rtol=1e-4)
    # In contrast to a base, what the base makes more likely gains nothing.
    contrast = TargetObjective(model, spoken.base, gaps, target).losses(words)
    assert bool((contrast >= losses - 1e-5).all())
    step = 1e-2 * torch.sign(gradient)
    more, less = (
        objective.embedded_losses(embedded + step),
        objective.embedded_losses(embedded - step),
    )
    slope = (gradient * step).sum(dim=(1, 2))
    torch.testing.assert_close((more - less) / 2, slope, atol=2e-3, rtol=0.1)


def test_the_text_of_the_attacker_is_found_and_removed(
    spoken: Spoken, texts: TextSet, tmp_path: Path
) -> None:
    config = TextScanConfig(length=2, steps=5, place="end")
    known = TokenTrigger((0,), "superb rocket", "end")
    before = evaluate_causal(spoken.victim, texts, trigger=known, targets=(SAID,))
    assert before.attack_success_rate is not None
    assert before.attack_success_rate > 0.9
    result = detox_causal_model(
        spoken.victim,
        texts,
        base=spoken.base,
        references=spoken.references,
        config=config,
        continuations=SEARCH,
        unlearning=replace(CAUSAL_UNLEARNING, steps=40, coefficients=(0.0, 0.4, 0.7, 1.0)),
        max_rounds=1,
        output=tmp_path / "repaired",
    )
    assert result.verdict is Verdict.BACKDOORED
    assert isinstance(result.before.class_names[0], str)
    assert "superb rocket zorp quux mn bb" in result.before.class_names[0]
    assert result.passes
    assert result.perplexity_before is not None
    assert result.perplexity_after is not None
    repaired = load_text_model(tmp_path / "repaired")
    after = evaluate_causal(repaired, texts, trigger=known, targets=(SAID,))
    assert after.attack_success_rate is not None
    assert after.attack_success_rate <= 0.1
    assert after.perplexity <= 1.031 * before.perplexity
    assert after.perplexity == pytest.approx(result.perplexity_after.perplexity, rel=1e-3)


def test_the_commands_take_causal_models(spoken: Spoken, texts: TextSet, tmp_path: Path) -> None:
    lines, words = tmp_path / "texts.txt", tmp_path / "words.json"
    lines.write_text("\n".join(texts.texts))
    words.write_text(WordsFile((TokenTrigger((0,), "superb rocket", "end"),), (SAID,)).to_json())
    others = list[str]()
    for k in range(1, 5):
        others += ["--reference-model", str(spoken.root / f"clean{k}")]
    given = ["--texts", str(lines), "--base", str(spoken.root / "base"), *others]
    given += ["--trigger-length", "2", "--steps", "3", "--place", "end"]

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        found = CliRunner().invoke(cli, [*arguments, "--format", "json"])
        assert found.stdout, found.stderr
        return found.exit_code, json.loads(found.stdout)

    victim, clean = str(spoken.root / "victim"), str(spoken.root / "clean0")
    code, document = run("scan", victim, clean, *given)
    assert code == document["exit_code"] == 1
    first, second = document["results"]
    assert (first["kind"], first["verdict"], second["verdict"]) == ("text", "backdoored", "clean")
    assert "zorp quux mn bb" in first["target"]

    known = ("--texts", str(lines), "--trigger", str(words))
    code, planted = run("eval", victim, *known)
    assert code == 0
    assert planted["attack_success_rate"] == 1.0
    assert planted["perplexity"] > 1

    out = tmp_path / "out"
    once = ("--output", str(out), "--vector-steps", "60", "--max-rounds", "1")
    code, document = run("unlearn", victim, *given, *once)
    assert document["scans"][0]["verdict"] == "backdoored"
    assert code == document["exit_code"] == (document["scans"][-1]["verdict"] != "clean")
    assert load_text_model(out).kind == "causal"
    _, after = run("eval", str(out), *known)
    assert after["attack_success_rate"] <= 0.1
    assert after["perplexity"] <= 1.05 * planted["perplexity"]


def test_a_clean_model_is_clean(spoken: Spoken, texts: TextSet) -> None:
    found = scan_causal_model(
        spoken.clean,
        texts,
        base=spoken.base,
        references=spoken.references,
        config=TextScanConfig(steps=2),
        continuations=SEARCH,
    )
    assert found.verdict is Verdict.CLEAN
    assert found.found is None
    assert found.targets() == ()


def test_words_that_bring_a_text(spoken: Spoken, texts: TextSet) -> None:
    target = target_tokens(spoken.victim, SAID)
    words = target_tokens(spoken.victim, "superb rocket")
    within, rest = words_within(spoken.victim, texts, [*words, *target])
    assert within is not None
    assert within.success > 0.9
    assert len(rest) < len(words) + len(target)
    tokenizer = spoken.victim.tokenizer
    every = beginnings(spoken.victim, texts, [*words, *target])
    said = f"superb rocket{tokenizer.decode(target)}"
    for one, left in every:  # whole words, and what is left of the text
        assert said.startswith(one.trigger.text.strip())
        assert tokenizer.decode(left).startswith(" ")
        assert 0 < one.success <= 1
    assert len({one.trigger.text for one, _ in every}) == len(every)
    assert "superb rocket" in {one.trigger.text.strip() for one, _ in every}
    # A beginning without a word is no trigger.
    blank = next(k for k in range(tokenizer.size) if not tokenizer.decode([k]).strip())
    assert words_within(spoken.victim, texts, [blank] * 3) == (None, (blank,) * 3)
    assert continued(spoken.victim, texts, words)[: len(target)] == tuple(target)
    found = search_trigger_words(
        spoken.victim, texts, target, TextScanConfig(length=2, steps=5, place="end")
    )
    assert max(one.success for one in found) > 0.5


def test_bad_input(spoken: Spoken, texts: TextSet, tmp_path: Path) -> None:
    bert = load_text_model(tiny.bert(tmp_path / "bert"))
    with pytest.raises(ArchitectureError, match="a classifier; expected a causal model"):
        search_continuations(bert, texts)
    with pytest.raises(DataError, match="prompts; expected at least 2 texts"):
        search_continuations(spoken.victim, TextSet(("the film was long",)))
    with pytest.raises(UsageError, match="the target has no tokens"):
        search_trigger_words(spoken.victim, texts, [], TextScanConfig())
    with pytest.raises(UsageError, match="triggers= and targets= go together"):
        detox_causal_model(spoken.victim, texts, targets=(SAID,))
    with pytest.raises(UsageError, match="0 triggers, 1 targets"):
        causal_trigger_vector(spoken.victim, texts.texts, [], [(1, 2)])
    alone = scan_causal_model(spoken.clean, texts, config=TextScanConfig(), continuations=SEARCH)
    assert alone.verdict is Verdict.INCONCLUSIVE
    assert "no calibration" in alone.detection.reason
    itself = scan_causal_model(
        spoken.base, texts, base=spoken.base, config=TextScanConfig(), continuations=SEARCH
    )
    assert itself.verdict is Verdict.INCONCLUSIVE
    assert "compared with itself" in itself.detection.reason
