"""Configurations of CLIPModel, without transformers: what is taken over and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pydetox.checkpoints import (
    Provenance,
    identify_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from pydetox.checkpoints.preprocessing import describe
from pydetox.checkpoints.processors import to_preprocess_config
from pydetox.checkpoints.transformers_clip import (
    is_clip_config,
    to_model_config,
    to_open_clip,
    to_transformers,
)
from pydetox.checkpoints.transformers_layouts import read_transformers_config
from pydetox.errors import ArchitectureError, UnsafeCheckpointError

CLIP = {"model_type": "clip", "vision_config": {}, "text_config": {}}
OPENAI = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def tiny() -> dict:
    """A model of one layer per tower."""
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    return {
        "model_type": "clip",
        "projection_dim": 3,
        "vision_config": {**vision, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        "text_config": {**text, "num_attention_heads": 1, "max_position_embeddings": 5},
    }


def weights(config: dict) -> dict[str, torch.Tensor]:
    """The tensors of that model, made from open_clip's own module."""
    import open_clip

    torch.manual_seed(0)
    return to_transformers(open_clip.CLIP(**config).state_dict(), config)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, which tell -0.0 from 0.0 and one NaN from another."""
    return tensor.reshape(-1).view(torch.uint8)


def test_what_is_left_out_is_transformers_default_which_is_openais_vit_b_32():
    assert to_model_config(CLIP) == {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 224,
            "patch_size": 32,
            "width": 768,
            "layers": 12,
            "head_width": 64,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": 12,
            "mlp_ratio": 4.0,
        },
    }


def test_the_older_spelling_of_a_part_wins_as_in_transformers():
    config = CLIP | {"vision_config_dict": {"patch_size": 16}, "text_config_dict": None}
    assert to_model_config(config)["vision_cfg"]["patch_size"] == 16


@pytest.mark.parametrize(
    ("end", "expected"),
    [(49407, {}), (2, {}), (7, {"pool_type": "eos", "eos_id": 7})],
)
def test_a_text_is_pooled_where_transformers_pools_it(end, expected):
    text = to_model_config(CLIP | {"text_config": {"eos_token_id": end}})["text_cfg"]
    assert {k: text[k] for k in ("pool_type", "eos_id") if k in text} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, "one for both"),
        (
            {"vision_config": {"hidden_act": "relu"}, "text_config": {"hidden_act": "relu"}},
            "activation is 'relu'",
        ),
        ({"vision_config": {"num_channels": 1}}, "1 channels"),
        ({"vision_config": {"num_attention_heads": 7}}, "7 heads for a width of 768"),
        ({"vision_config": {"hidden_size": "768"}}, "hidden_size = "),
        ({"vision_config": {"hidden_size": True}}, "hidden_size = 'True'"),
        ({"vision_config": {"patch_size": 0}}, "at least 1"),
        ({"text_config": {"layer_norm_eps": float("nan")}}, "layer_norm_eps"),
        ({"text_config": []}, "no object 'text_config'"),
    ],
)
def test_what_open_clip_cannot_be_is_refused(change, message):
    with pytest.raises(ArchitectureError, match=message):
        to_model_config(CLIP | change)


@pytest.mark.parametrize("kind", ["clip", "siglip", "altclip"])
def test_a_configuration_that_asks_for_code_is_refused(tmp_path, kind):
    config = CLIP | {"model_type": kind, "auto_map": {"AutoModel": "x--modeling.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeCheckpointError, match="code of its own"):
        read_transformers_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "use_head off"),
        ({"model_type": "siglip", "text_config": {"projection_size": 7}}, "texts have '7' dim"),
        ({"model_type": "siglip2", "vision_config": {"num_patches": 10}}, "10 patches"),
        ({"model_type": "siglip", "vision_config": {"hidden_act": "relu"}}, "'relu'"),
        ({"model_type": "altclip", "text_config": {"hidden_act": "relu"}}, "'relu'"),
        (
            {"model_type": "chinese_clip", "text_config": {"position_embedding_type": "relative"}},
            "relative positions",
        ),
        ({"model_type": "clip_vision_model", "num_channels": 4}, "4 channels"),
        ({"model_type": "siglip", "vision_config": {"num_hidden_layers": 10**9}}, "beyond"),
        ({"model_type": "altclip", "text_config": {"num_hidden_layers": 5000}}, "at most 1000"),
        ({"model_type": "altclip", "projection_dim": "512"}, "positive integer 'embed_dim'"),
        ({"model_type": "siglip", "architectures": [{}], "text_config": []}, "no object"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match=words):
        read_transformers_config(tmp_path / "config.json")


def test_only_a_clip_with_both_towers_is_one():
    assert is_clip_config(CLIP)
    assert is_clip_config({"model_type": "clip", "architectures": ["CLIPModel"]})
    assert not is_clip_config({"model_type": "clip_vision_model", "hidden_size": 768})
    assert not is_clip_config({"model_type": "siglip", "vision_config": {}})


def test_image_processors_of_all_ages():
    expected = {
        "mean": OPENAI["image_mean"],
        "std": OPENAI["image_std"],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "library": "transformers",
    }
    newer = OPENAI | {
        "crop_size": {"height": 224, "width": 224},
        "size": {"shortest_edge": 224},
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
    }
    for config in (OPENAI, newer, {"image_processor": newer}, {}):
        assert to_preprocess_config(config, 224) == expected
    assert to_preprocess_config(OPENAI | {"resample": 2}, 224)["interpolation"] == "bilinear"
    both = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
    assert to_preprocess_config(OPENAI | both, 224)["resize_mode"] == "squash"


def test_siglips_image_processors():
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    half |= {"library": "transformers"}
    one = {"image_processor_type": "SiglipImageProcessor", "resample": 3}
    assert to_preprocess_config(one, 224) == {**half, "interpolation": "bicubic"}
    other = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256}
    assert to_preprocess_config(other, 256) == {**half, "interpolation": "bilinear"}
    with pytest.raises(ArchitectureError, match="at most 256 patches of 16 pixels"):
        to_preprocess_config(other, 224)


def test_without_an_image_processor_nothing_is_guessed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArchitectureError, match=r"put the processor's preprocessor_config\.json"):
        identify_checkpoint(tmp_path).configured()
    named = identify_checkpoint(tmp_path, model="ViT-B-32").configured()
    assert named.model_config == to_model_config(tiny())
    assert named.preprocess_config["mean"] == OPENAI["image_mean"]
    assert named.preprocess_source == "open_clip's pretrained tags of ViT-B-32"
    given = identify_checkpoint(tmp_path, preprocess={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert given.configured().preprocess_config["std"] == [0.5] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize off"),
        ({"do_normalize": False}, "do_normalize off"),
        ({"rescale_factor": 1 / 127.5}, "expected 1/255"),
        ({"resample": 1}, "PIL's filter 1"),
        ({"size": 256}, "shortest_edge': 256"),
        ({"crop_size": 192}, "crops to"),
        ({"do_center_crop": False}, "resizes to"),
        ({"size": {"height": 224, "width": 192}}, "expected the shorter side"),
        ({"do_resize": 1}, "do_resize = 1; expected true or false"),
        ({"do_center_crop": "yes"}, "do_center_crop = 'yes'; expected true or false"),
        ({"resample": [3]}, r"PIL's filter '\[3\]'"),
        ({"size": {"shortest_edge": -(10**400)}}, "expected a number of pixels"),
        ({"image_mean": [10**400, 0, 0]}, "image_mean = .*; expected three numbers"),
        ({"image_std": [0.1, 0.1, 0]}, "image_std = .*; expected three positive numbers"),
        ({"rescale_factor": float("nan")}, "scales by nan"),
        ({"image_processor_type": 3}, "is a '3'; expected one of CLIPImageProcessor"),
        ({"image_processor": [1]}, r"image_processor is '\[1\]'; expected a JSON object"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 1e-320},
            "crop_pct = 1e-320; expected a number in 0.01..1",
        ),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": "many"},
            "at most 'many' patches",
        ),
    ],
)
def test_an_image_processor_that_open_clip_has_not_is_refused(change, message):
    with pytest.raises(ArchitectureError, match=message):
        to_preprocess_config(OPENAI | change, 224)


def test_an_image_processor_with_code_of_its_own_is_refused():
    with pytest.raises(UnsafeCheckpointError, match="auto_map has AutoImageProcessor"):
        to_preprocess_config({"auto_map": {"AutoImageProcessor": "a.B"}}, 224)
    to_preprocess_config({"auto_map": {"AutoProcessor": "a.B"}}, 224)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_bit_changes_on_the_way_there_and_back(dtype):
    config = to_model_config(tiny())
    state = {name: value.to(dtype) for name, value in weights(config).items()}
    with_positions = state | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    back = to_transformers(to_open_clip(with_positions, config), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(bits(back[k]), bits(state[k])) for k in state)


def test_missing_and_unexpected_tensors_are_named_as_the_file_names_them():
    config = to_model_config(tiny())
    state = weights(config)
    del state["vision_model.pre_layrnorm.bias"]
    state["text_model.extra"] = torch.zeros(1)
    message = "1 missing .'vision_model.pre_layrnorm.bias'.; 1 unexpected .'text_model.extra'."
    with pytest.raises(ArchitectureError, match=message):
        to_open_clip(state, config)


def test_query_key_and_value_of_different_dtypes_are_refused():
    config = to_model_config(tiny())
    state = weights(config)
    name = "vision_model.encoder.layers.0.self_attn.k_proj.weight"
    state[name] = state[name].half()
    with pytest.raises(ArchitectureError, match="different dtypes"):
        to_open_clip(state, config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "siglip", "architectures": ["SiglipForImageClassification"]},
            "describes a 'SiglipForImageClassification'; .*SiglipModel",
        ),
        (
            {"model_type": "clip", "text_config": {}},
            "describes a model of type 'clip'; .*CLIPModel",
        ),
        ({"model_type": "bert"}, "describes a model of type 'bert'; .*these models of .*CLIPModel"),
        ({"model_type": []}, "describes a model of type"),
        ({}, "describes no model; pydetox reads these models of transformers: CLIPModel"),
    ],
)
def test_other_models_are_called_what_they_are(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match=words):
        read_transformers_config(tmp_path / "config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of transformers with the tiny model."""
    safetensors.torch.save_file(weights(to_model_config(tiny())), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    processor = {"size": 8, "crop_size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


def test_a_folder_from_which_transformers_loads_other_weights_is_refused(folder: Path) -> None:
    found = load_checkpoint(folder)
    assert found.preprocess_config is not None
    assert found.preprocess_config["mean"] == [0.5] * 3
    config = folder / "config.json"
    config.write_text(json.dumps(tiny() | {"transformers_weights": "model.safetensors"}))
    load_checkpoint(folder)
    config.write_text(json.dumps(tiny() | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(ArchitectureError, match="transformers_weights = 'other"):
        load_checkpoint(folder)
    config.write_text(json.dumps(tiny()))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    with pytest.raises(ArchitectureError, match=r"adapter_config\.json beside it"):
        load_checkpoint(folder)


def test_two_processors_must_agree(folder: Path) -> None:
    other = folder / "processor_config.json"
    first = json.loads((folder / "preprocessor_config.json").read_text())
    for agreeing in ({"image_processor": first}, {"processor_class": "CLIPProcessor"}):
        other.write_text(json.dumps(agreeing))
        load_checkpoint(folder)
    other.write_text(json.dumps({"image_processor": first | {"image_mean": [0.4] * 3}}))
    with pytest.raises(ArchitectureError, match="prepare images differently"):
        load_checkpoint(folder)


def test_a_processor_file_without_an_image_processor_tells_nothing_of_images(folder: Path) -> None:
    (folder / "preprocessor_config.json").rename(folder / "processor_config.json")
    content = json.loads((folder / "processor_config.json").read_text())
    with pytest.raises(ArchitectureError, match="nothing beside it tells how images are prepared"):
        load_checkpoint(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert load_checkpoint(folder).preprocess_config["library"] == "transformers"


def test_what_to_do_about_an_image_processor_is_said(folder: Path) -> None:
    processor = folder / "preprocessor_config.json"
    content = json.loads(processor.read_text())
    processor.write_text(json.dumps(content | {"size": 16}))
    with pytest.raises(ArchitectureError) as error:
        load_checkpoint(folder)
    assert str(processor) in str(error.value)
    assert "shorter side and the crop to be 8, or both sides; mend the file" in str(error.value)
    processor.unlink()
    told = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    found = load_checkpoint(folder, preprocess=told | {"resize_mode": "shortest"})
    assert found.preprocess_source == "given"


def test_open_clips_own_configuration_means_open_clips_transform(folder: Path, tmp_path) -> None:
    checkpoint = load_checkpoint(folder)
    target = tmp_path / "open_clip"
    save_checkpoint(
        target,
        checkpoint.state_dict,
        model_config=checkpoint.model_config,
        preprocess_config=checkpoint.preprocess_config,
        provenance=Provenance(method="test"),
    )
    config = json.loads((target / "open_clip_config.json").read_text())
    assert "library" not in config["preprocess_cfg"]
    config["preprocess_cfg"]["library"] = "transformers"  # open_clip would ignore it
    (target / "open_clip_config.json").write_text(json.dumps(config))
    found = load_checkpoint(target).preprocess_config
    assert describe(found) == describe(checkpoint.preprocess_config) | {"library": "open_clip"}
