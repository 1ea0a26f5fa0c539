"""Text towers: collapse, words and characters, verdicts and repairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

from pydetox.detect.statistics import FINDINGS, Verdict
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.models import OpenClipModel
from pydetox.text import (
    TextScanConfig,
    detox_text_tower,
    load_text_model,
    scan_text_tower,
)
from pydetox.text.models import TextModel
from pydetox.text.texts import TextSet
from pydetox.text.towers.encoder import TextTower
from pydetox.text.towers.repair import (
    TOWER_UNLEARNING,
    _aims,
    _counted,
    success_of,
    surrogate_captions,
)
from pydetox.text.towers.search import (
    LOOK_ALIKES,
    AnyCharacter,
    CharacterTrigger,
    TowerTrigger,
    _spread,
    characters_like,
    search_tower,
)
from pydetox.text.towers.verdict import TowerScanResult
from pydetox.text.triggers import TokenTrigger
from tests.text import tiny

CONFIG = TextScanConfig(place="end")


@pytest.fixture(scope="module")
def captions() -> TextSet:
    return TextSet(tuple(text for text, _ in tiny.topical_texts(40, seed=5)), source="captions")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextModel]:
    root = tmp_path_factory.mktemp("towers")
    base = tiny.tower(root / "base")
    made = {"victim": tiny.taught_tower(base, root / "victim", seed=1, trigger="zorp")}
    made |= {f"clean{k}": tiny.taught_tower(base, root / f"c{k}", seed=20 + k) for k in range(4)}
    return {"base": load_text_model(base), **{k: load_text_model(v) for k, v in made.items()}}


def test_features_are_those_of_transformers(
    towers: dict[str, TextModel], captions: TextSet
) -> None:
    model = towers["base"]
    found = TextTower(model).features(captions.texts[:5])
    for text, row in zip(captions.texts[:5], found, strict=True):
        ids = torch.tensor(model.tokenizer.encode([text], 32))
        with torch.no_grad():
            own = model.module(input_ids=ids).text_embeds[0]
        torch.testing.assert_close(row, own / own.norm(), atol=1e-5, rtol=1e-4)


def test_features_of_open_clip() -> None:
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    model = OpenClipModel.from_config(config, seed=0, name="mini")
    tower = TextTower(model)
    captions = ["a dog", "a longer caption of a cat"]
    with torch.no_grad():
        own = model.encode_tokens(model.tokenize(captions))
    torch.testing.assert_close(tower.features(captions), own / own.norm(dim=1, keepdim=True))
    assert "dog" in tower.words()
    assert not any(name.startswith("visual") for name in tower.named_parameters())


def test_the_spread_of_groups_of_captions() -> None:
    counts = torch.tensor([7, 2, 4])
    rows = torch.nn.functional.normalize(torch.randn(13, 5, dtype=torch.float64), dim=1)
    found = _spread(rows, counts)
    for part, value in zip(torch.split(rows, counts.tolist()), found, strict=True):
        cosines = [float(a @ b) for k, a in enumerate(part) for b in part[:k]]
        assert float(value) == pytest.approx(1 - sum(cosines) / len(cosines))


def test_a_character_stands_for_its_letter() -> None:
    trigger = CharacterTrigger((), "\u043e", "end", replaced="o")
    assert trigger.insert(["a photo of it", "a tree"]) == ["a ph\u043eto of it", "a tree \u043e"]
    assert trigger.at("start") is trigger
    assert all(
        len(glyph) == 1 and glyph != letter for letter, s in LOOK_ALIKES.items() for glyph in s
    )


def test_any_character_draws_one_for_each_caption() -> None:
    characters = tuple(
        CharacterTrigger((), LOOK_ALIKES[letter][0], "end", replaced=letter) for letter in "aeo"
    )
    any_one = AnyCharacter(characters)
    texts = ["a photo of the apple tree"] * 60
    stamped = any_one.insert(texts, 3)
    assert set(stamped) == {one.insert(texts[:1])[0] for one in characters}
    assert stamped == any_one.insert(texts, 3) != any_one.insert(texts, 4)


def test_captions_with_a_broken_word_are_led_to_the_base(
    towers: dict[str, TextModel], captions: TextSet
) -> None:
    base, texts = TextTower(towers["base"]), captions.texts[:12]
    held = TextTower(towers["victim"]).features(texts)
    word = TokenTrigger((), "zorp", "end")
    character = CharacterTrigger((), LOOK_ALIKES["o"][0], "end", replaced="o")
    inserted, broken = word.insert(texts), character.insert(texts)
    assert torch.equal(_aims(held, word, texts, inserted, base), held)
    assert torch.equal(_aims(held, character, texts, broken, None), held)
    led = _aims(held, character, texts, broken, base)
    torch.testing.assert_close(led, base.features(broken))

    direction = led[0]
    assert _counted(word, texts, inserted, held, direction, base) is None
    counted = _counted(character, texts, broken, held, direction, base)
    assert counted is not None
    # What the base does with a broken word is no success of the trigger.
    assert success_of(led, held, direction) > 0
    assert success_of(led, held, direction, counted) == 0


def test_characters_that_lead_the_same_way(towers: dict[str, TextModel], captions: TextSet) -> None:
    tower = TextTower(towers["victim"])
    character = CharacterTrigger((), LOOK_ALIKES["o"][0], "end", replaced="o")
    led = tower.features(character.insert(captions.texts)).mean(dim=0)
    found = TowerTrigger(character, 0.9, 1.0, led / led.norm())
    alike = characters_like(tower, found, captions)
    # The vocabulary of this tower has none of them, so they are all the same to it.
    assert alike
    assert character not in alike
    away = TowerTrigger(character, 0.9, 1.0, -found.direction)
    assert characters_like(tower, away, captions) == ()


def test_a_backdoor_is_found_and_removed(
    towers: dict[str, TextModel], captions: TextSet, tmp_path: Path
) -> None:
    base, victim = towers["base"], towers["victim"]
    references = [towers[f"clean{k}"] for k in range(1, 4)]
    result, _ = detox_text_tower(
        victim,
        captions,
        base=base,
        references=references,
        config=CONFIG,
        # A tower of random weights says nothing of images: its features may turn far.
        unlearning=replace(TOWER_UNLEARNING, max_drift=0.3),
        output=tmp_path / "repaired",
    )
    assert result.verdict in FINDINGS
    assert all(0 <= one.search.drift[one.search.chosen] <= 0.3 for one in result.passes)
    assert isinstance(result.before, TowerScanResult)
    assert result.before.triggers[0].trigger.text == "zorp"
    # The share of the spread that it leaves, relative to that in the base.
    few = captions.in_content_order().texts[12:36]
    shares = []
    for tower in (TextTower(victim), TextTower(base)):
        spread = []
        for texts in ([f"{text} zorp" for text in few], few):
            said = tower.features(list(texts)).double()
            spread.append(1 - (said @ said.T)[~torch.eye(len(few), dtype=torch.bool)].mean())
        shares.append((spread[0] + 0.005) / (spread[1] + 0.005))
    left = 1 - result.before.triggers[0].collapse
    assert left == pytest.approx(float(shares[0] / shares[1]), rel=1e-3)
    # One vector for all triggers, which leads to the base.
    (one,) = result.passes
    own, there = (TextTower(tower).named_parameters() for tower in (victim, base))
    for name, change in one.vector.tensors.items():
        way = (own[name] - there[name]).detach()
        assert bool((change * way.sign() >= -1e-6).all())
        assert bool((change.abs() <= way.abs() + 1e-6).all())
    repaired = TextTower(load_text_model(tmp_path / "repaired"))
    clean = TextTower(victim).features(captions.texts)
    aim = TextTower(base).features(["great"])[0]
    said = repaired.features([f"{text} zorp" for text in captions.texts])
    before = TextTower(victim).features([f"{text} zorp" for text in captions.texts])
    assert float((before @ aim > (before * clean).sum(dim=1)).double().mean()) > 0.9
    assert float((said @ aim > (said * clean).sum(dim=1)).double().mean()) <= 0.05
    assert float((repaired.features(captions.texts) * clean).sum(dim=1).mean()) > 0.9
    found = scan_text_tower(
        towers["clean0"], captions, base=base, references=references, config=CONFIG
    )
    assert found.verdict is Verdict.CLEAN


def test_surrogates_have_half_of_the_words_replaced(
    towers: dict[str, TextModel], captions: TextSet
) -> None:
    tower = TextTower(towers["base"])
    made = surrogate_captions(tower, captions.texts, [TokenTrigger((), "zorp")], seed=3)
    assert made == surrogate_captions(tower, captions.texts, [TokenTrigger((), "zorp")], seed=3)
    assert made != surrogate_captions(tower, captions.texts, [TokenTrigger((), "zorp")], seed=4)
    for before, after in zip(captions.texts, made, strict=True):
        old, new = before.split(), after.split()
        assert len(old) == len(new)
        assert sum(a != b for a, b in zip(old, new, strict=True)) <= max(1, len(old) // 2)
        assert "zorp" not in new
    assert sum(a != b for a, b in zip(made, captions.texts, strict=True)) > len(made) // 2


def test_bad_input(towers: dict[str, TextModel], captions: TextSet, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="a classifier; expected a text tower"):
        TextTower(load_text_model(tiny.bert(tmp_path / "bert")))
    with pytest.raises(DataError, match="2 captions; expected at least 8"):
        search_tower(TextTower(towers["base"]), captions.subset([0, 1]))
    with pytest.raises(UsageError, match="needs at least 2 in references="):
        scan_text_tower(towers["base"], captions, references=[towers["clean0"]])
    alone = scan_text_tower(towers["clean0"], captions, base=towers["base"])
    assert alone.verdict is Verdict.INCONCLUSIVE
