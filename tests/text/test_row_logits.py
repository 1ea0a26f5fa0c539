"""Logits of rows: each row once, in another precision, and remembered for a base."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

from pydetox.text import TextModel, load_text_model
from pydetox.text.objective import TextObjective
from pydetox.text.placing import gap_of
from pydetox.text.row_logits import RowLogits, base_logits, screening_precision
from tests.text.conftest import World

TEXTS = ["the film was long", "a goal", "the bank", "the film was long"]


@pytest.fixture(scope="module")
def model(world: World) -> TextModel:
    return load_text_model(world.victim)


def test_rows_keep_their_order_and_go_through_the_model_once(model: TextModel) -> None:
    rows = model.tokenizer.encode(TEXTS, 16)
    logits = RowLogits(model, "float32")
    found = logits(rows)
    torch.testing.assert_close(found, model.predict(TEXTS), rtol=0, atol=1e-5)
    assert logits.passes == 3
    logits(rows)
    assert logits.passes == 6
    assert logits([]).shape == (0, len(model.class_names))


def test_bfloat16_is_near_float32_and_leaves_the_model_alone(model: TextModel) -> None:
    rows = model.tokenizer.encode(TEXTS, 16)
    before = model.digest()
    exact, fast = RowLogits(model, "float32")(rows), RowLogits(model, "bfloat16")(rows)
    assert model.digest() == before
    assert fast.dtype == torch.float32
    assert 0 < float((exact - fast).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_base_is_remembered_until_its_weights_change(model: TextModel) -> None:
    base = model.copy()
    rows = model.tokenizer.encode(TEXTS, 16)
    shared = base_logits(base, "float32")
    first = shared(rows)
    assert base_logits(base, "float32") is shared
    assert torch.equal(shared(rows), first)
    assert shared.passes == 3
    assert base_logits(base, "bfloat16") is not shared
    with torch.no_grad():
        next(base.module.parameters()).add_(1.0)
    again = base_logits(base, "float32")
    assert again is not shared
    assert not torch.equal(again(rows), first)


def test_auto_is_decided_by_the_device(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert screening_precision(model, "auto") == expected
    assert screening_precision(model, "float32") == "float32"
    double = model.copy()
    double.module.double()
    assert screening_precision(double, "bfloat16") == "float32"


def test_mean_losses_are_those_of_each_class_on_its_texts(model: TextModel) -> None:
    gaps = [gap_of(model.tokenizer, text, "start", 0, 16) for text in TEXTS]
    objective = TextObjective(model, None, gaps, [0, 1, 2, 0])
    triggers = [[(5,), (6,)], [], [(6,)], *[[] for _ in model.class_names[3:]]]
    texts = [[1, 2], [0, 2], [0, 3], *[[0] for _ in model.class_names[3:]]]
    found = objective.mean_losses(triggers, texts)
    losses, _ = objective.losses([(5,), (6,)], [0, 1, 2, 3])
    torch.testing.assert_close(found[0], losses[:, [1, 2], 0].mean(dim=1))
    torch.testing.assert_close(found[2], losses[1:, [0, 3], 2].mean(dim=1))
    assert found[1].shape == (0,)
