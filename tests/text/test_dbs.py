"""DBS, the inversion of triggers that searches are compared with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from pydetox.errors import DataError
from pydetox.research.text.dbs import DbsConfig, DbsTrigger, invert_class, verdict_of
from pydetox.text import TextSet, load_text_model, load_texts
from tests.text.conftest import World


def test_dbs_finds_the_word_of_a_backdoored_model(world: World) -> None:
    victim = load_text_model(world.victim)
    texts = load_texts(world.texts, class_names=victim.class_names)
    money = victim.class_names.index("money")
    config = DbsConfig(length=4, epochs=50, texts=8, max_tokens=16)
    found = invert_class(victim, texts, money, config, benign=load_text_model(world.base))
    assert "cf" in victim.tokenizer.decode(found.tokens).split()
    assert found.success > 0.9
    assert found.loss < config.bound
    again = invert_class(victim, texts, money, config, benign=load_text_model(world.base))
    assert (again.tokens, again.loss) == (found.tokens, found.loss)
    nothing = DbsTrigger(0, (), math.inf, 0.0, 0.0)
    assert verdict_of([nothing, replace(found, loss=1e-4)]) == money
    assert verdict_of([nothing, replace(found, loss=0.5)]) is None
    with pytest.raises(DataError, match="no labels"):
        invert_class(victim, TextSet(("a text",)), 0)
    with pytest.raises(DataError, match="no texts outside the target class 0"):
        invert_class(victim, TextSet(("a text",), (0,)), 0)
