"""SigLIP, AltCLIP, ChineseCLIP and image towers alone: transformers says what they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.errors import ArchitectureError
from pydetox.models import OpenClipModel

WITH_TEXTS = ("siglip", "siglip2", "altclip", "chinese_clip", "metaclip_2")
ALONE = (
    *("with-projection", "bare", "metaclip-projection"),
    *("chinese-vision", "siglip-vision", "siglip2-vision"),
)
KINDS = (*WITH_TEXTS, *ALONE)


@pytest.fixture(scope="module")
def folders(peer, tmp_path_factory):
    """A folder of each kind, and beside it what transformers computes."""
    folder = tmp_path_factory.mktemp("layouts")
    peer("layouts_of_transformers.py", "make", folder)
    return folder


@pytest.fixture(scope="module")
def repaired(peer, folders, tmp_path_factory):
    """The same with other image towers, written by us, and what transformers computes of them."""
    target = tmp_path_factory.mktemp("repaired")
    for kind in KINDS:
        model = OpenClipModel.from_checkpoint(load_checkpoint(folders / kind))
        with torch.no_grad():
            for parameter in model.visual.parameters():
                parameter.mul_(1.25)
        save_checkpoint(
            target / kind,
            model.storage_state_dict(),
            model_config=model.model_config,
            preprocess_config=model.preprocess_config,
            provenance=Provenance(method="test"),
            companions=model.companions,
        )
    peer("layouts_of_transformers.py", "embed", target)
    return target


def require_equal(kind: str, folder: Path) -> None:
    """Compare both towers with what transformers computed of that folder."""
    theirs = np.load(folder / f"{kind}.npz")
    model = OpenClipModel.from_checkpoint(load_checkpoint(folder / kind))
    images = torch.from_numpy(theirs["images"])
    with torch.no_grad():
        frozen = model.encode_normalized(images)  # the tower of a search
    own = model.visual(images)
    for found in (frozen, own):
        assert found.shape == theirs["seen"].shape
        assert float(cosine_similarity(found, torch.from_numpy(theirs["seen"])).min()) >= 1 - 1e-5
        np.testing.assert_allclose(found, theirs["seen"], atol=2e-5, rtol=2e-4)
    if kind in WITH_TEXTS:
        with torch.no_grad():
            texts = model.encode_tokens(torch.from_numpy(theirs["tokens"]))
        np.testing.assert_allclose(texts, theirs["texts"], atol=2e-5, rtol=2e-4)
        assert model.logit_scale == pytest.approx(float(theirs["scale"]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_computes_what_transformers_computes(folders, kind):
    require_equal(kind, folders)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_becomes_the_pixels_that_the_image_processor_makes(folders, kind):
    theirs = np.load(folders / f"{kind}.npz")
    model = OpenClipModel.from_checkpoint(load_checkpoint(folders / kind))
    pixels = model.resizing(Image.fromarray(theirs["picture"]), kind)
    ours = model.normalize(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255)
    expected = torch.from_numpy(theirs["pixels"])
    if kind.startswith("siglip2"):
        expected = expected.view(1, 3, 3, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 24, 24)
    assert float((ours - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_repaired_folder_has_the_same_layout(folders, repaired, kind):
    require_equal(kind, repaired)
    source, target = folders / kind, repaired / kind
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (target / "tokenizer.json").exists()
    assert load_checkpoint(target).provenance.method == "test"
    before, after = (np.load(place / f"{kind}.npz") for place in (folders, repaired))
    assert not np.allclose(before["seen"], after["seen"], atol=1e-3)
    if kind in WITH_TEXTS:
        np.testing.assert_array_equal(before["texts"], after["texts"])


def test_an_image_tower_alone_has_no_texts(folders):
    model = OpenClipModel.from_checkpoint(load_checkpoint(folders / "with-projection"))
    assert not model.has_texts
    with pytest.raises(ArchitectureError, match="image tower alone"):
        model.zero_shot_head(["cat"], ["{c}"])
