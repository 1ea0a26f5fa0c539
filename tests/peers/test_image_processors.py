"""Processor files of all kinds: the pixels are AutoImageProcessor's, or the file is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pydetox.checkpoints.processors import DEFAULTS, to_preprocess_config
from pydetox.data import Resizing
from pydetox.errors import ArchitectureError

#: Those whose margin around the crop is odd are among them, wide and tall.
SIZES = (
    *((640, 427), (1024, 683), (96, 60), (33, 47), (427, 640), (301, 224)),
    *((48, 48), (300, 300), (17, 130)),
)
SIDE = 224
ONE = {"height": SIDE, "width": SIDE}
SHORT = {"shortest_edge": SIDE}
OTHER = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.4]}


def of(name: str, **more: object) -> dict[str, object]:
    return {"image_processor_type": f"{name}ImageProcessor", **more}


def older(name: str, **more: object) -> dict[str, object]:
    return {"feature_extractor_type": f"{name}FeatureExtractor", **more}


#: What AutoImageProcessor reads, and we as well.
READ = (
    (of("CLIP"), "clip"),
    (of("CLIP", resample=2, **OTHER), "clip"),
    (of("CLIP", resample=0), "clip"),
    (of("CLIP", size=SIDE, crop_size=SIDE), "clip"),
    (of("CLIP", size=[SIDE, SIDE]), "clip"),
    (of("CLIP", image_mean=0.5, image_std=0.5), "clip"),
    (of("CLIP", image_mean=[0.4], image_std=[0.2]), "clip"),
    (of("CLIP", size=SIDE, default_to_square=True), "clip"),
    (of("CLIP", size=ONE, do_center_crop=False), "clip"),
    (of("CLIP", size=ONE, do_center_crop=None), "clip"),
    (of("CLIP", do_pad=True), "clip"),
    (of("CLIP", do_pad=True, pad_size=ONE), "clip"),
    (of("CLIP") | {"image_processor_type": "CLIPImageProcessorFast"}, "clip"),
    (of("CLIP") | {"image_processor_type": "CLIPImageProcessorPil"}, "clip"),
    (older("CLIP", size=SIDE, crop_size=SIDE), "clip"),
    ({}, "clip"),
    ({}, "siglip"),
    ({}, "altclip"),
    ({}, "chinese_clip"),
    ({}, "metaclip_2"),
    ({"size": SIDE}, "clip"),
    (of("ChineseCLIP"), "chinese_clip"),
    (of("Bit"), "clip"),
    (of("Blip", size=SIDE), "clip"),
    (of("Siglip"), "siglip"),
    (of("Siglip", resample=2, size=ONE), "siglip"),
    (of("ViT"), "clip"),
    (of("ViT", size=SIDE), "clip"),
    (of("ViT", size=[SIDE, SIDE], resample=3), "clip"),
    (of("ViT", size=SHORT, do_center_crop=True, crop_size=SIDE), "clip"),
    (older("ViT", size=SIDE), "clip"),
    (of("ViT"), "siglip"),
    (of("DeiT", size=SIDE), "clip"),
    (of("DeiT", size=ONE, do_center_crop=False, **OTHER), "clip"),
    (of("ConvNext", size=SHORT, crop_pct=1.0), "clip"),
    (of("ConvNext", size=SIDE, crop_pct=1), "clip"),
    (of("ConvNext", size=SIDE, crop_pct=1, do_center_crop=True, crop_size=SIDE), "clip"),
    (of("EfficientNet", size=SIDE, include_top=False), "clip"),
)
#: What AutoImageProcessor reads in a way that we do not have.
REFUSED = (
    (of("CLIP", size=256), "clip", "resizes to .'shortest_edge': 256. and crops to"),
    (of("CLIP", do_center_crop=False), "clip", "resizes to .'shortest_edge': 224.; expected"),
    (of("CLIP", do_pad=True, pad_size=240), "clip", "pads to '?240"),
    (of("CLIP", size={"shortest_edge": SIDE, "longest_edge": 300}), "clip", "longest_edge': 300"),
    (of("CLIP", resample=1), "clip", "PIL's filter 1"),
    (of("CLIP", use_square_size=True), "clip", "use_square_size = True"),
    (of("CLIP", do_rescale=False), "clip", "do_rescale off"),
    (of("ViT", size=256), "clip", "resizes to .'height': 256, 'width': 256.; expected"),
    (of("DeiT"), "clip", "resizes to .'height': 256, 'width': 256. and crops to"),
    (older("DeiT"), "clip", "resizes to .'height': 256"),
    (of("ConvNext", size=SIDE), "clip", "resizes to .'shortest_edge': 256. and crops to"),
    (of("ConvNext", size=SIDE, crop_pct=0.95), "clip", "resizes to .'shortest_edge': 235"),
    (of("ConvNext"), "clip", "resizes to .'height': 384, 'width': 384.; expected"),
    (of("Blip"), "clip", "resizes to .'height': 384"),
    (of("EfficientNet", size=SIDE), "clip", "include_top = True; expected false"),
    (
        of("EfficientNet", size=SIDE, include_top=False, rescale_offset=True),
        "clip",
        "rescale_offset = True; expected false",
    ),
    (of("Siglip", size=SIDE), "siglip", "resizes to .'shortest_edge': 224.; expected"),
    (of("Beit"), "clip", "is a 'BeitImageProcessor'; expected one of CLIPImageProcessor"),
)
#: What AutoImageProcessor refuses.
UNREAD = (
    (of("CLIP", image_mean=None), "clip", "image_mean = None; expected three numbers"),
    (of("CLIP", image_std=[0.1, 0.2]), "clip", r"image_std = '\[0.1, 0.2\]'; expected three pos"),
    (of("CLIP", image_mean=["a", "b", "c"]), "clip", "image_mean = "),
    (of("CLIP", size=None), "clip", "size = None; expected a number of pixels"),
    (of("CLIP", size="224"), "clip", "size = '224'"),
    (of("CLIP", size=[SIDE]), "clip", "size = "),
    (of("CLIP", size={"edge": SIDE}), "clip", "size = "),
    (of("CLIP", crop_size=None), "clip", "crop_size = None"),
    (of("CLIP", rescale_factor="0.0039"), "clip", "scales by '0.0039'"),
    (of("CLIP", rescale_factor=None), "clip", "scales by None"),
    (of("CLIP", resample=None), "clip", "PIL's filter None"),
    (of("ConvNext", size=[SIDE, SIDE]), "clip", "expected a shortest_edge alone"),
    (older("AltCLIP"), "altclip", "is a 'AltCLIPImageProcessor'"),
    (of("Any"), "clip", "is a 'AnyImageProcessor'"),
)
ALL = (*READ, *(case[:2] for case in (*REFUSED, *UNREAD)))


@cache
def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    made = {}
    for width, height in SIZES:
        noise = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.integers(-20, 21, (height, width, 3))
        made[f"{width}x{height}"] = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
    return made


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processors")
    (folder / "cases.json").write_text(
        json.dumps([[*case, index < len(READ)] for index, case in enumerate(ALL)])
    )
    np.savez(folder / "pictures.npz", **pictures())
    peer("processors_of_transformers.py", folder)
    return folder


def prepared(config: dict, picture: np.ndarray) -> np.ndarray:
    """Pixels as a model gets them, float32 [3, H, W]."""
    resizing = Resizing(
        SIDE, config["interpolation"], config["resize_mode"], library=config["library"]
    )
    pixels = np.asarray(resizing(Image.fromarray(picture), "picture")).transpose(2, 0, 1)
    mean, std = (np.array(config[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    return ((pixels / 255 - mean) / std).astype(np.float32)


@pytest.mark.parametrize("index", range(len(READ)), ids=lambda k: f"{READ[k][1]}-{READ[k][0]}")
def test_what_is_read_has_the_pixels_of_the_image_processor(folder, index):
    config = to_preprocess_config(READ[index][0], SIDE, READ[index][1])
    theirs = np.load(folder / f"{index}.npz")
    given = pictures()
    assert set(theirs) == set(given)
    for size, picture in given.items():
        np.testing.assert_allclose(
            prepared(config, picture), theirs[size], atol=2e-5, rtol=0, err_msg=size
        )


def test_what_cannot_be_expressed_is_refused(folder):
    errors = json.loads((folder / "errors.json").read_text())
    for index, (content, model_type, words) in enumerate(REFUSED, start=len(READ)):
        assert str(index) not in errors, "transformers refuses it as well"
        with pytest.raises(ArchitectureError, match=words):
            to_preprocess_config(content, SIDE, model_type)


def test_what_transformers_refuses_is_refused(folder):
    errors = json.loads((folder / "errors.json").read_text())
    start = len(READ) + len(REFUSED)
    assert {int(index) for index in errors} == set(range(start, len(ALL)))
    for content, model_type, words in UNREAD:
        with pytest.raises(ArchitectureError, match=words):
            to_preprocess_config(content, SIDE, model_type)


def test_the_table_has_what_each_class_does_where_its_file_is_silent(folder):
    theirs = json.loads((folder / "defaults.json").read_text())
    assert set(theirs) == set(DEFAULTS)
    for name, ours in DEFAULTS.items():
        for key, value in json.loads(json.dumps(ours)).items():
            if name == "Siglip2ImageProcessor" and key == "default_to_square":
                continue  # it has no size
            # What a class does not name is off.
            assert theirs[name].get(key, None if key == "crop_size" else False) == value, (
                name,
                key,
            )


def test_siglip2_makes_the_same_pixels_of_square_pictures(peer, tmp_path):
    sides = (32, 96)
    contents = [of("Siglip2", max_num_patches=(side // 16) ** 2 + 3) for side in sides]
    cases = [[content, "siglip2", True] for content in contents]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    squares = {name: one for name, one in pictures().items() if one.shape[0] == one.shape[1]}
    np.savez(tmp_path / "pictures.npz", **squares)
    peer("processors_of_transformers.py", tmp_path)
    for index, (side, content) in enumerate(zip(sides, contents, strict=True)):
        config = to_preprocess_config(content, side, "siglip2")
        resizing = Resizing(
            side, config["interpolation"], config["resize_mode"], library=config["library"]
        )
        theirs = np.load(tmp_path / f"{index}.npz")
        assert len(theirs) == len(squares) > 1
        count = side // 16
        for name, picture in squares.items():
            rows = torch.from_numpy(theirs[name][: count * count]).view(count, count, 16, 16, 3)
            pixels = rows.permute(4, 0, 2, 1, 3).reshape(3, side, side) * 0.5 + 0.5
            ours = np.asarray(resizing(Image.fromarray(picture), name)).transpose(2, 0, 1)
            np.testing.assert_allclose(pixels * 255, ours, atol=1e-3, err_msg=name)
