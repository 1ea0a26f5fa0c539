"""Who tells how images are prepared, what a guess is, and what counts first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from pydetox.checkpoints import identify_checkpoint, load_checkpoint
from pydetox.checkpoints.preprocessing import describe, differs, preparation_of
from pydetox.checkpoints.writing import save_weights
from pydetox.errors import ArchitectureError, UsageError

VALUES = ("mean", "std", "interpolation", "resize_mode", "fill_color")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "some.safetensors"
    path.parent.mkdir()
    save_weights(path, {"a": torch.zeros(2)})
    return path


def beside(weights: Path, content: dict[str, Any]) -> None:
    (weights.parent / "open_clip_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", open_clip.list_models())
def test_a_name_tells_what_its_pretrained_weights_have(name: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    theirs = [
        merge_preprocess_dict(PreprocessCfg(), open_clip.get_pretrained_cfg(name, tag))
        for tag in tags
    ]
    theirs = [{key: one[key] for key in VALUES} for one in theirs]
    found = preparation_of(name)
    ours = describe(found.config)
    if not tags:
        assert ours == describe(None)
        assert found.guessed == VALUES[:4]
        return
    plain = [describe(one) for one in theirs]
    assert ours == max(plain, key=plain.count)
    assert bool(found.guessed) == any(one != ours for one in plain)
    assert set(found.guessed) == {key for one in plain for key in one if one[key] != ours[key]}


def test_a_file_without_configuration_takes_what_the_name_tells(weights: Path) -> None:
    mobile = load_checkpoint(weights, model="MobileCLIP-S1")
    assert describe(mobile.preprocess_config)["mean"] == [0.0, 0.0, 0.0]
    assert describe(mobile.preprocess_config)["interpolation"] == "bilinear"
    assert mobile.preprocess_source == "open_clip's pretrained tags of MobileCLIP-S1"
    assert mobile.warnings == ()
    siglip = load_checkpoint(weights, model="ViT-B-16-SigLIP")
    assert describe(siglip.preprocess_config)["resize_mode"] == "squash"


def test_where_tags_differ_it_is_a_guess_until_it_is_told(weights: Path) -> None:
    found = load_checkpoint(weights, model="ViT-L-14")
    (warning,) = found.warnings
    assert "laion2b_s32b_b82k has mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]" in warning
    assert "mean, std are a guess" in warning
    assert "\n" not in warning
    told = load_checkpoint(
        weights, model="ViT-L-14", preprocess={"mean": [0.5] * 3, "std": [0.5] * 3}
    )
    assert told.warnings == ()
    assert describe(told.preprocess_config)["mean"] == [0.5] * 3
    assert told.preprocess_source == "most of open_clip's pretrained tags of ViT-L-14; " + (
        "mean, std given"
    )
    half = load_checkpoint(weights, model="ViT-S-16", preprocess={"mean": [0.5] * 3})
    assert "std, interpolation, resize_mode are a guess" in half.warnings[0]
    with pytest.raises(ArchitectureError, match=r"some\.safetensors: .*three finite positive"):
        load_checkpoint(weights, model="ViT-B-32", preprocess={"std": [0.0] * 3})


def test_a_configuration_of_its_own_comes_first(weights: Path, mini_config: dict) -> None:
    own = {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}
    beside(weights, {"model_cfg": mini_config, "preprocess_cfg": own})
    plain = load_checkpoint(weights)
    named = load_checkpoint(weights, model="PE-Core-B-16")
    assert plain.model_config == named.model_config == mini_config
    assert plain.preprocess_config == named.preprocess_config == own
    assert plain.warnings == ()
    assert plain.digest == named.digest
    assert "tells another architecture than PE-Core-B-16, which was named" in named.warnings[0]
    assert load_checkpoint(weights, model=weights.parent / "open_clip_config.json").warnings == ()
    with pytest.raises(UsageError, match="did you mean"):
        load_checkpoint(weights, model="ViT-B-33")
    given = load_checkpoint(weights, preprocess={"mean": [0.9] * 3})
    assert given.preprocess_config == own | {"mean": [0.9] * 3}
    assert given.preprocess_source == "open_clip_config.json; mean given"


def test_a_configuration_that_is_silent_about_images(weights: Path, mini_config: dict) -> None:
    beside(weights, {"model_cfg": mini_config})
    silent = load_checkpoint(weights)
    assert silent.preprocess_config is None
    assert silent.preprocess_source == "open_clip's default"
    assert not identify_checkpoint(weights).tells_preprocessing()
    named = load_checkpoint(weights, model="MobileCLIP-B")
    assert named.model_config == mini_config
    assert describe(named.preprocess_config)["mean"] == [0.0, 0.0, 0.0]


def test_the_quick_activation_is_another_architecture() -> None:
    first, second = (
        open_clip.get_model_config(name) for name in ("ViT-B-32", "ViT-B-32-quickgelu")
    )
    assert differs(first, second)
    assert not differs(first, dict(first))
    assert differs(first, open_clip.get_model_config("ViT-B-16"))
