"""The way from a file to a model's pixels: equal to open_clip's own transform, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import PILToTensor

from pydetox.checkpoints.preprocessing import describe, preparation_of
from pydetox.data import Resizing, load_images

SIZES = ((7, 7), (5, 31), (64, 23), (33, 34), (8, 100))


def noise(size: tuple[int, int], channels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def grey16(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 700, size[::-1]).astype(np.uint16))


def rgb(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(noise(size, 3))


def rotated(size: tuple[int, int]) -> Image.Image:
    image = rgb(size)
    image.getexif()[0x0112] = 6  # orientation: turned by 90 degrees
    return image


#: Kinds of images that people have, and the format that holds them.
KINDS: dict[str, tuple[str, Callable[[tuple[int, int]], Image.Image]]] = {
    "rgb": ("png", rgb),
    "grey": ("png", lambda size: rgb(size).convert("L")),
    "grey and alpha": ("png", lambda size: Image.fromarray(noise(size, 2), "LA")),
    "alpha": ("png", lambda size: Image.fromarray(noise(size, 4), "RGBA")),
    "palette": ("png", lambda size: rgb(size).convert("P")),
    "palette, one colour clear": ("gif", lambda size: rgb(size).convert("P")),
    "two levels": ("png", lambda size: rgb(size).convert("1")),
    "16 bits": ("png", grey16),
    "32 bits": (
        "tiff",
        lambda size: Image.fromarray(noise(size, 1)[..., 0].astype(np.int32)),
    ),
    "float": ("tiff", lambda size: Image.fromarray(noise(size, 1)[..., 0].astype(np.float32))),
    "CMYK": ("jpeg", lambda size: rgb(size).convert("CMYK")),
    "EXIF": ("jpeg", rotated),
}


def save(path: Path, kind: str, size: tuple[int, int]) -> Path:
    suffix, make = KINDS[kind]
    image = make(size)
    more = {"exif": image.getexif()} if kind == "EXIF" else {}
    if kind == "palette, one colour clear":
        more["transparency"] = 3
    image.save(path.with_suffix(f".{suffix}"), **more)
    return path.with_suffix(f".{suffix}")


def theirs(path: Path, image_size: int, **given: object) -> torch.Tensor:
    """What open_clip makes of a file before it normalises: float32 in [0, 1]."""
    transform = open_clip.image_transform(image_size, is_train=False, **given)  # type: ignore[arg-type]
    del transform.transforms[-1]
    with Image.open(path) as image:
        return transform(image)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_sees_the_pixels_that_open_clip_would_give_it(
    tmp_path: Path, kind: str, interpolation: str, resize_mode: str
) -> None:
    given = {"interpolation": interpolation, "resize_mode": resize_mode, "fill_color": 93}
    for index, size in enumerate(SIZES):
        path = save(tmp_path / f"{index}", kind, size)
        try:
            expected = theirs(path, 15, **given)
        except (ValueError, OSError, TypeError, KeyError):
            # Pillow cannot pad images of every mode, so that open_clip has no pixels for them.
            assert resize_mode == "longest"
            path.unlink()
            continue
        (folder := tmp_path / f"folder{index}").mkdir()
        path.rename(folder / path.name)
        ours = load_images(folder, image_size=15, **given).images[0]
        assert torch.equal(ours.float() / 255, expected), (size, kind)


@cache
def _ways() -> dict[tuple, list[str]]:
    """The different ways of preparing images among all tags and names, with who has them."""
    ways: dict[tuple, list[str]] = {}
    for name in open_clip.list_models():
        size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
        tags = open_clip.list_pretrained_tags_by_model(name)
        configs = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
        for config in (*configs, preparation_of(name).config):
            known = describe(config)
            way = (size, known["interpolation"], known["resize_mode"], known["fill_color"])
            ways.setdefault(way, []).append(name)
    return ways


def test_every_configuration_of_open_clip_gives_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(noise((37, 20), 3)).resize((370, 200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.png")
    ways = _ways()
    assert {way[2] for way in ways} == {"shortest", "squash"}
    assert len({name for names in ways.values() for name in names}) == len(open_clip.list_models())
    for size, interpolation, resize_mode, fill_color in ways:
        with Image.open(tmp_path / "a.png") as opened:
            resizing = Resizing(size, interpolation, resize_mode, fill_color)
            ours = PILToTensor()(resizing(opened, "a.png")).float() / 255
        given = {"interpolation": interpolation, "resize_mode": resize_mode}
        assert torch.equal(ours, theirs(tmp_path / "a.png", size, fill_color=fill_color, **given))


def test_pixels_are_those_of_create_model_and_transforms(tmp_path: Path) -> None:
    # The whole of open_clip, not its transform alone: SigLIP squashes.
    import json

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16}
        | {"patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1}
        | {"layers": 1},
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    folder = tmp_path / "model"
    folder.mkdir()
    whole = {"model_cfg": config, "preprocess_cfg": preprocess | {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    clip = open_clip.CLIP(**config)
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")

    from pydetox.checkpoints import load_checkpoint
    from pydetox.models import OpenClipModel

    model = OpenClipModel.from_checkpoint(load_checkpoint(folder))
    assert model.preprocessing == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 0,
        "library": "open_clip",
        "source": "open_clip_config.json",
    }
    image = Image.fromarray(noise((96, 32), 3))
    image.save(tmp_path / "a.png")
    pixels = PILToTensor()(model.resizing(image, "a")).float()[None] / 255
    assert torch.allclose(model.normalize(pixels)[0], transform(image), atol=1e-6, rtol=0)
