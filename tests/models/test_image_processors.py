"""The way from a picture to the pixels of a model of transformers: those of its image processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import open_clip
import safetensors.torch
import torch
from PIL import Image
from torchvision.transforms import PILToTensor
from transformers import AutoImageProcessor, CLIPImageProcessor, CLIPImageProcessorPil

from pydetox.checkpoints import load_checkpoint
from pydetox.checkpoints.transformers_clip import to_model_config, to_transformers
from pydetox.data import Resizing, load_images
from pydetox.errors import DataError
from pydetox.models import OpenClipModel

SIZES = ((640, 427), (1024, 683), (96, 60), (33, 47), (60, 60), (224, 224), (301, 224), (61, 300))
FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def picture(size: tuple[int, int], channels: int = 3) -> Image.Image:
    """Smooth noise with some grain."""
    rng = np.random.default_rng(size[0])
    small = rng.integers(0, 256, (7, 9, channels), dtype=np.uint8).squeeze()
    smooth = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
    grained = smooth + rng.integers(-20, 21, smooth.shape)
    return Image.fromarray(np.clip(grained, 0, 255).astype(np.uint8))


def by(kind: type, image: Image.Image, side: int, resize_mode: str, resample: int) -> np.ndarray:
    """Whole levels as an image processor makes them, [H, W, 3]."""
    both = {"height": side, "width": side}
    processor = kind(
        size={"shortest_edge": side} if resize_mode == "shortest" else both,
        crop_size=both,
        resample=resample,
        do_normalize=False,
        do_rescale=False,
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("side", [32, 224])
def test_pixels_are_those_of_the_image_processor(side, interpolation, resize_mode):
    resizing = Resizing(side, interpolation, resize_mode, library="transformers")
    for size in SIZES:
        image = picture(size)
        ours = np.asarray(resizing(image, "picture")).astype(int)
        theirs = by(CLIPImageProcessor, image, side, resize_mode, FILTERS[interpolation])
        np.testing.assert_array_equal(ours, theirs, err_msg=str(size))
        if interpolation != "nearest":  # Pillow filters the two directions in another order
            older = by(CLIPImageProcessorPil, image, side, resize_mode, FILTERS[interpolation])
            levels = np.abs(ours - older)
            assert levels.max() <= 4, size
            assert (levels > 1).mean() < 0.005, size


def test_only_an_odd_margin_tells_the_two_crops_apart():
    for size, shift in (((640, 427), 1), ((1024, 683), 1), ((640, 480), 0), ((427, 640), 1)):
        image = picture(size)
        theirs, own = (
            np.asarray(Resizing(224, library=library)(image, "picture")).astype(int)
            for library in ("transformers", "open_clip")
        )
        axis = int(size[0] > size[1])
        moved = np.roll(theirs, -shift, axis)
        inner = [slice(None), slice(None)]
        inner[axis] = slice(0, 223)
        assert np.abs(moved[tuple(inner)] - own[tuple(inner)]).max() <= 1
        for step in open_clip.image_transform(224, is_train=False).transforms[:3]:
            image = step(image)
        np.testing.assert_array_equal(own, np.asarray(image))


#: Kinds of pictures that people have.
KINDS: dict[str, Callable[[tuple[int, int]], Image.Image]] = {
    "grey": lambda size: picture(size).convert("L"),
    "alpha": lambda size: picture(size, 4),
    "grey and alpha": lambda size: picture(size, 4).convert("LA"),
    "palette": lambda size: picture(size).convert("P"),
    "two levels": lambda size: picture(size).convert("1"),
    "16 bits": lambda size: Image.fromarray(np.asarray(picture(size))[..., 0].astype(np.uint16)),
    "CMYK": lambda size: picture(size).convert("CMYK"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_are_not_rgb(kind):
    for size in ((640, 427), (33, 47)):
        image = KINDS[kind](size)
        if kind == "palette":
            image.info["transparency"] = 3
        ours = np.asarray(Resizing(32, library="transformers")(image, "picture"))
        np.testing.assert_array_equal(ours, by(CLIPImageProcessor, image, 32, "shortest", 3))


def test_what_transformers_has_no_name_for():
    image = picture((96, 61))
    longest = {"resize_mode": "longest", "fill_color": 9}
    for changes, same in (
        (longest, Resizing(32, **longest)),
        ({"interpolation": "random"}, Resizing(32, library="transformers")),
    ):
        ours = Resizing(32, library="transformers", **changes)(image, "picture")
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(same(image, "picture")))
    lanczos = Resizing(32, "lanczos", library="transformers")(image, "picture")
    theirs = by(CLIPImageProcessorPil, image, 32, "shortest", 1)
    np.testing.assert_array_equal(np.asarray(lanczos), theirs)
    with pytest.raises(DataError, match="library 'timm' is not known; expected one of open_clip"):
        Resizing(32, library="timm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of transformers with a tiny model of 32 pixels."""
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    config = {
        "model_type": "clip",
        "projection_dim": 3,
        "vision_config": {**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        "text_config": {**text, "num_attention_heads": 1, "max_position_embeddings": 5},
    }
    ours = to_model_config(config)
    torch.manual_seed(0)
    state = to_transformers(open_clip.CLIP(**ours).state_dict(), ours)
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        {"size": 32, "crop_size": 32},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
        {"size": [32, 32], "crop_size": 32, "image_mean": 0.5, "image_std": 0.5},
        {"image_processor_type": "ConvNextImageProcessor", "size": 32, "crop_pct": 1.0},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
    ],
)
def test_a_folder_of_pictures_becomes_what_auto_image_processor_makes(folder, tmp_path, content):
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, size in enumerate(SIZES):
        picture(size).save(photos / f"{index}.png")
    model = OpenClipModel.from_checkpoint(load_checkpoint(folder))
    assert model.preprocessing["library"] == "transformers"
    assert model.preprocessing["source"] == "preprocessor_config.json"
    found = load_images(photos, resizing=model.resizing).images
    assert found.shape == (len(SIZES), 3, 32, 32)
    pictures = [Image.open(photos / f"{index}.png") for index in range(len(SIZES))]
    processor = AutoImageProcessor.from_pretrained(folder)
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model.normalize(found.float() / 255), theirs, atol=1e-5, rtol=0)
    alone = PILToTensor()(model.resizing(pictures[0], "picture"))
    assert torch.equal(alone, found[0])
