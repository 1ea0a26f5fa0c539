"""CLIPModel folders: transformers itself says what their weights compute."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pydetox.checkpoints import Checkpoint, Provenance, load_checkpoint, save_checkpoint
from pydetox.checkpoints.transformers_clip import (
    to_model_config,
    to_open_clip,
    to_transformers,
)
from pydetox.data import load_images
from pydetox.errors import OutputError
from pydetox.models import OpenClipModel


def tokens() -> np.ndarray:
    """Three texts: one short, one with the next-to-last token in it, one that fills all places."""
    result = np.zeros((3, 16), dtype=np.int64)
    result[:, 0] = 49406
    result[0, 1:3] = [320, 49407]
    result[1, 1:5] = [5, 49405, 7, 49407]
    result[2, 1:] = [*range(3, 17), 49407]
    return result


@pytest.mark.parametrize("variant", ["quick-gelu", "gelu", "tanh"])
def test_both_towers_compute_what_transformers_computes(peer, tmp_path, variant):
    peer("clip_of_transformers.py", "make", tmp_path, variant)
    state = load_file(tmp_path / "model.safetensors")
    config = to_model_config(json.loads((tmp_path / "config.json").read_text()))
    converted = to_open_clip(state, config)
    model = OpenClipModel.from_checkpoint(
        Checkpoint(converted, config, None, variant, tmp_path, "", "safetensors")
    )
    images = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "in.npz", images=images, tokens=tokens())
    said = json.loads(peer("clip_of_transformers.py", "embed", tmp_path))
    theirs = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        ours = model.encode_normalized(torch.from_numpy(images))  # the tower of a search
        texts = model.encode_tokens(torch.from_numpy(tokens()))
    np.testing.assert_allclose(ours, theirs["images"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(texts, theirs["texts"], atol=1e-5, rtol=0)
    assert model.logit_scale == pytest.approx(said["scale"])

    back = to_transformers(model.storage_state_dict(), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("variant", ["quick-gelu", "sharded", "float16"])
def test_a_folder_goes_in_and_a_folder_comes_out(peer, tmp_path, variant):
    source, target = tmp_path / "source", tmp_path / "target"
    peer("clip_of_transformers.py", "make", source, variant)
    (source / "merges.txt").write_text("#version: 0.2\ni n\n")
    checkpoint = load_checkpoint(source)
    assert checkpoint.preprocess_config == {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "library": "transformers",
    }
    model = OpenClipModel.from_checkpoint(checkpoint)
    assert model.mean == (0.4, 0.5, 0.6)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.mul_(1.25)  # a repair, of a kind that float16 holds exactly

    def write(overwrite: bool = False) -> None:
        save_checkpoint(
            target,
            model.storage_state_dict(),
            model_config=model.model_config,
            preprocess_config=model.preprocess_config,
            provenance=Provenance(method="test"),
            companions=model.companions,
            overwrite=overwrite,
        )

    write()
    with pytest.raises(OutputError):
        write()
    write(overwrite=True)
    names = {path.name for path in target.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
    }
    for name in ("config.json", "merges.txt", "preprocessor_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert "CLIPModel.from_pretrained" in (target / "README.md").read_text()

    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    np.savez(target / "in.npz", images=images, tokens=tokens())
    peer("clip_of_transformers.py", "embed", target)
    theirs = np.load(target / "out.npz")
    again = OpenClipModel.from_checkpoint(load_checkpoint(target))
    with torch.no_grad():
        ours = again.encode_normalized(torch.from_numpy(images))
        texts = again.encode_tokens(torch.from_numpy(tokens()))
    np.testing.assert_allclose(ours, theirs["images"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(texts, theirs["texts"], atol=1e-5, rtol=1e-5)
    assert load_checkpoint(target).provenance.method == "test"


def test_a_photograph_becomes_the_pixels_that_the_image_processor_makes(peer, tmp_path):
    from PIL import Image

    source = tmp_path / "source"
    peer("clip_of_transformers.py", "make", source, "quick-gelu")
    noise = np.random.default_rng(1).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise).resize((141, 90), Image.Resampling.BICUBIC)
    (tmp_path / "photos").mkdir()
    photograph.save(tmp_path / "photos" / "one.png")
    np.savez(
        source / "in.npz",
        images=np.zeros((1, 3, 32, 32), np.float32),
        tokens=tokens(),
        photograph=np.asarray(photograph),
    )
    peer("clip_of_transformers.py", "embed", source)
    theirs = np.load(source / "pixels.npz")["pixels"]
    model = OpenClipModel.from_checkpoint(load_checkpoint(source))
    images = load_images(tmp_path / "photos", resizing=model.resizing)
    ours = model.normalize(images.images.float() / 255)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_model_object_is_scanned_repaired_and_gets_its_weights_back(peer, tmp_path):
    found = json.loads(peer("clip_object.py", tmp_path / "out").splitlines()[-1])
    assert found["difference"] < 1e-5
    assert found["repaired"] < 1e-5
    assert found["unchanged"]
    assert found["callback"]
    assert found["warned"], "an object does not know its processor"
    assert found["loaded"] is not False
