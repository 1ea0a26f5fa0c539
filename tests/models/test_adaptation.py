"""State dicts as people have them: open_clip loads them, or a message says what to do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import load_checkpoint as open_clip_load

from pydetox.checkpoints import Checkpoint, Provenance, load_checkpoint, save_checkpoint
from pydetox.errors import ArchitectureError
from pydetox.models import OpenClipModel
from pydetox.models.activation import _openai_files
from tests.mini import MINI_CONFIG, mini_model

SIGLIP = MINI_CONFIG | {"init_logit_bias": -10}


@pytest.fixture
def clip() -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(**MINI_CONFIG).eval()


def read(tmp_path: Path, state: dict[str, Any], config: dict[str, Any]) -> OpenClipModel:
    import json

    torch.save(state, tmp_path / "some.pt")
    (tmp_path / "mini.json").write_text(json.dumps(config))
    return OpenClipModel.from_checkpoint(
        load_checkpoint(tmp_path / "some.pt", model=tmp_path / "mini.json")
    )


def changes(model: OpenClipModel) -> list[str]:
    return [line for line in model.warnings if "are a guess" not in line]


def check_equal(model: OpenClipModel, clip: torch.nn.Module) -> None:
    size = MINI_CONFIG["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(1, 400, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model.encode_normalized(images), clip.encode_image(images), atol=1e-5)
        assert torch.allclose(model.encode_tokens(tokens), clip.encode_text(tokens), atol=1e-5)


@pytest.mark.parametrize(
    "prefix",
    [
        *("model.", "clip_model.", "_orig_mod.", "module._orig_mod.", "image_encoder.model."),
        *("module.", "model.clip.", "_orig_mod.module."),
    ],
)
def test_wrappers_are_removed(tmp_path: Path, clip: torch.nn.Module, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in clip.state_dict().items()}
    model = read(tmp_path, state, MINI_CONFIG)
    assert changes(model) == []
    check_equal(model, clip)


def test_what_stands_beside_a_wrapped_model_is_left_out_and_said(
    tmp_path: Path, clip: torch.nn.Module
) -> None:
    state = {f"image_encoder.model.{name}": value for name, value in clip.state_dict().items()}
    model = read(tmp_path, state | {"classification_head.weight": torch.zeros(3)}, MINI_CONFIG)
    (line,) = changes(model)
    assert "1 tensors beside the model are left out (classification_head.weight)" in line
    check_equal(model, clip)


@pytest.mark.parametrize("other", ["ema_model.{}", "teacher.{}", "image_encoder.model.{}"])
def test_two_wrapped_models_in_one_dictionary_are_refused(
    tmp_path: Path, clip: torch.nn.Module, other: str
) -> None:
    state = clip.state_dict()
    second = {other.format(name): -value for name, value in state.items()}
    with pytest.raises(ArchitectureError, match="holds two models: tensors that begin"):
        read(tmp_path, {f"model.{name}": v for name, v in state.items()} | second, MINI_CONFIG)


@pytest.mark.parametrize("config", [MINI_CONFIG, MINI_CONFIG | {"custom_text": True}])
def test_two_text_towers_are_refused(
    tmp_path: Path, clip: torch.nn.Module, config: dict[str, Any]
) -> None:
    state = clip.state_dict()
    second = {f"text.{name}": -v for name, v in state.items() if not name.startswith("visual.")}
    for both in (state | second, second | state):
        with pytest.raises(ArchitectureError, match="which loaders take for one"):
            read(tmp_path, both, config)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_what_open_clip_corrects_is_corrected(
    tmp_path: Path, clip: torch.nn.Module, shape: tuple[int, ...]
) -> None:
    state = clip.state_dict() | {"logit_scale": clip.logit_scale.detach().reshape(shape)}
    check_equal(read(tmp_path, state, MINI_CONFIG), clip)
    theirs = copy.deepcopy(clip)
    open_clip_load(theirs, str(tmp_path / "some.pt"))
    # A model of SigLIP that begins from weights without the bias gets zero.
    model = read(tmp_path, state, SIGLIP)
    theirs = open_clip.CLIP(**SIGLIP)
    open_clip_load(theirs, str(tmp_path / "some.pt"))
    ours = model.clip.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())


def test_masks_and_counts_of_old_versions_are_left_out(
    tmp_path: Path, clip: torch.nn.Module
) -> None:
    more = {
        "attn_mask": torch.zeros(8, 8),
        "text.transformer.embeddings.position_ids": torch.ones(9),
    }
    model = read(tmp_path, clip.state_dict() | more, MINI_CONFIG)
    assert changes(model) == []
    check_equal(model, clip)


def test_names_of_a_custom_text_tower_both_ways(tmp_path: Path, clip: torch.nn.Module) -> None:
    custom = {**MINI_CONFIG, "custom_text": True}
    model = read(tmp_path, clip.state_dict(), custom)
    check_equal(model, clip)
    theirs = open_clip.CustomTextCLIP(**MINI_CONFIG)
    open_clip_load(theirs, str(tmp_path / "some.pt"))
    ours = model.clip.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())
    check_equal(read(tmp_path, model.clip.state_dict(), MINI_CONFIG), clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_position_embeddings_are_resized_as_open_clip_does(
    tmp_path: Path, clip: torch.nn.Module, dtype: torch.dtype
) -> None:
    larger = copy.deepcopy(MINI_CONFIG)
    larger["vision_cfg"]["image_size"] = 32
    model = read(tmp_path, {k: v.to(dtype) for k, v in clip.state_dict().items()}, larger)
    (line,) = changes(model)
    assert "position embedding has 5 tokens and the architecture 17: it is resized" in line
    theirs = open_clip.CLIP(**larger)
    torch.save(clip.state_dict(), tmp_path / "plain.pt")
    open_clip_load(theirs, str(tmp_path / "plain.pt"))
    name = "visual.positional_embedding"
    ours = model.clip.state_dict()[name]
    tolerance = 1e-3 if dtype == torch.float16 else 0
    assert torch.allclose(ours, theirs.state_dict()[name], atol=tolerance)


def test_what_cannot_be_loaded_says_what_to_do(tmp_path: Path, clip: torch.nn.Module) -> None:
    state = clip.state_dict()
    with pytest.raises(ArchitectureError, match=r"1 unexpected .*lacks \"init_logit_bias\""):
        read(tmp_path, state | {"logit_bias": torch.zeros(())}, MINI_CONFIG)
    pruned = dict(state)
    pruned["visual.proj_orig"] = pruned.pop("visual.proj")
    pruned["visual.proj_mask"] = torch.ones(32, 16)
    with pytest.raises(ArchitectureError, match=r"prune\.remove"):
        read(tmp_path, pruned, MINI_CONFIG)
    with pytest.raises(ArchitectureError, match=r"1 missing \('logit_scale'\)"):
        read(tmp_path, {k: v for k, v in state.items() if k != "logit_scale"}, MINI_CONFIG)
    lora = {f"base_model.model.{k}.lora_A.weight": v for k, v in state.items()}
    with pytest.raises(ArchitectureError, match=r"holds adapters .*merge_and_unload"):
        read(tmp_path, lora, MINI_CONFIG)


@pytest.mark.parametrize(
    ("old", "new", "advice"),
    [
        ("", "_fsdp_wrapped_module.", "remove '_fsdp_wrapped_module.' from all names"),
        ("resblocks.0.", "resblocks.0._fsdp_wrapped_module.", "FullStateDictConfig"),
        ("resblocks.0.", "resblocks.0._checkpoint_wrapped_module.", "wrapper that saves memory"),
        ("", "student.", "its names begin with 'student.': write the weights again"),
    ],
)
def test_names_of_wrappers_say_what_to_do(
    tmp_path: Path, clip: torch.nn.Module, old: str, new: str, advice: str
) -> None:
    state = {
        name.replace(old, new) if old else f"{new}{name}": value
        for name, value in clip.state_dict().items()
    }
    with pytest.raises(ArchitectureError) as caught:
        read(tmp_path, state, MINI_CONFIG)
    assert advice in str(caught.value)


def test_two_models_say_which_names_to_keep(tmp_path: Path, clip: torch.nn.Module) -> None:
    state = clip.state_dict()
    ema = {f"ema.{name}": value + 1 for name, value in state.items()}
    with pytest.raises(ArchitectureError, match=r"another model as well \(.* with 'ema\.'\)"):
        read(tmp_path, state | ema, MINI_CONFIG)
    student = {f"student.{name}": value for name, value in state.items()}
    with pytest.raises(ArchitectureError, match=r"2 models \(.* with 'student\.', 'ema\.'\)"):
        read(tmp_path, student | ema, MINI_CONFIG)


def test_parts_of_weights_say_what_to_do(tmp_path: Path, clip: torch.nn.Module) -> None:
    layer = clip.visual.transformer.resblocks[0].mlp.c_fc
    torch.nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ArchitectureError, match="remove_parametrizations"):
        read(tmp_path, clip.state_dict(), MINI_CONFIG)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    read(tmp_path, clip.state_dict(), MINI_CONFIG)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(layer)
    with pytest.raises(ArchitectureError, match="remove_weight_norm"):
        read(tmp_path, clip.state_dict(), MINI_CONFIG)


def test_openais_weights_are_refused_under_a_name_with_gelu(
    tmp_path: Path, clip: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(_openai_files()) == 9
    entries = {"input_resolution": 16, "context_length": 8, "vocab_size": 49408}
    state = clip.state_dict() | {name: torch.tensor(value) for name, value in entries.items()}
    with pytest.raises(ArchitectureError, match=r"weights of OpenAI \(by the entries .*quick_gelu"):
        read(tmp_path, state, MINI_CONFIG)
    read(tmp_path, state, MINI_CONFIG | {"quick_gelu": True})
    # A folder that tells its own architecture is believed.
    (tmp_path / "mini.json").rename(tmp_path / "open_clip_config.json")
    OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "some.pt"))
    torch.save(clip.state_dict(), tmp_path / "other.pt")
    (tmp_path / "open_clip_config.json").rename(tmp_path / "mine.json")
    given = load_checkpoint(tmp_path / "other.pt", model=tmp_path / "mine.json")
    monkeypatch.setattr("pydetox.models.activation._openai_files", lambda: {given.sha256})
    OpenClipModel.from_checkpoint(given)  # with quick_gelu
    import json

    (tmp_path / "mine.json").write_text(json.dumps(MINI_CONFIG))
    given = load_checkpoint(tmp_path / "other.pt", model=tmp_path / "mine.json")
    with pytest.raises(ArchitectureError, match="by the hash of the file"):
        OpenClipModel.from_checkpoint(given)


def test_image_towers_alone_are_read_under_all_their_names() -> None:
    whole = mini_model(2)
    state = whole.clip.state_dict()
    tower = {k: v for k, v in state.items() if k.startswith("visual.")}
    left = {k: v for k, v in state.items() if not k.startswith("transformer.")}  # task_vectors'
    files = {
        "visual": tower,
        "bare": {k.removeprefix("visual."): v for k, v in tower.items()},
        "wrapped": {f"module.{k}": v for k, v in tower.items()},
        "left": {f"model.{k}": v for k, v in left.items()},
    }
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, weights in files.items():
        checkpoint = Checkpoint(weights, MINI_CONFIG, None, name, Path("x"), "", "torch")
        model = OpenClipModel.from_checkpoint(checkpoint)
        assert not model.has_texts
        assert torch.equal(model.encode_pixels(pixels), whole.encode_pixels(pixels))
        assert any("image tower alone" in line for line in model.warnings)
    broken = {k: v for k, v in tower.items() if k != "visual.conv1.weight"}
    checkpoint = Checkpoint(broken, MINI_CONFIG, None, "broken", Path("x"), "", "torch")
    with pytest.raises(ArchitectureError, match="do not fit the architecture"):
        OpenClipModel.from_checkpoint(checkpoint)


def test_an_image_tower_alone_is_written_and_read_again(tmp_path: Path) -> None:
    whole = mini_model(2)
    tower = {k: v for k, v in whole.clip.state_dict().items() if k.startswith("visual.")}
    checkpoint = Checkpoint(tower, MINI_CONFIG, None, "tower", Path("x"), "", "torch")
    model = OpenClipModel.from_checkpoint(checkpoint)
    save_checkpoint(
        tmp_path / "written",
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    again = OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "written"))
    assert not again.has_texts
    assert not again.warnings
    assert all(torch.equal(again.clip.state_dict()[k], v) for k, v in tower.items())
    assert "as_model" in (tmp_path / "written" / "README.md").read_text()
