"""Causal models: prompts and continuations, words, trigger vectors, verdicts and repairs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

from pydetox.text import load_text_model, save_text_model
from pydetox.text.causal.prompts import Prompts, cut_prompts
from pydetox.text.texts import TextSet
from tests.text import tiny


@pytest.fixture(scope="module")
def texts() -> TextSet:
    return TextSet(tuple(text for text, _ in tiny.topical_texts(40, seed=4)), source="a test")


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
