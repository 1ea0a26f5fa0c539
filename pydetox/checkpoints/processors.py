"""How an image processor of transformers prepares images, as open_clip's ``preprocess_cfg``.

Sources: ``AutoImageProcessor`` for the class of a file, ``image_processing_*.py`` for what each
class does where the file is silent, ``BaseImageProcessor`` for what a size can be; transformers 5.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydetox.checkpoints.index import quote
from pydetox.checkpoints.layout import PROCESSOR_NAMES
from pydetox.checkpoints.transformers_files import read_object
from pydetox.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError

Config = dict[str, Any]

#: PIL's numbers of the filters that open_clip knows by name.
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}

_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_SHORTEST = {"size": {"shortest_edge": 224}, "default_to_square": False, "do_center_crop": True}
_BOTH = {"size": {"height": 224, "width": 224}}
_CROP = {"crop_size": {"height": 224, "width": 224}}

#: What all classes do where they say nothing else. `default_to_square` is what one number as a
#: size means: both sides, or the shorter one.
_ALL: Config = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "default_to_square": True,
    "crop_size": None,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
#: What each class does where its file is silent.
DEFAULTS: Mapping[str, Config] = {
    "CLIPImageProcessor": {**_ALL, **_OPENAI, **_SHORTEST, **_CROP},
    "ChineseCLIPImageProcessor": {**_ALL, **_OPENAI, **_SHORTEST, **_CROP},
    "BitImageProcessor": {**_ALL, **_OPENAI, **_SHORTEST, **_CROP},
    "BlipImageProcessor": {**_ALL, **_OPENAI, "size": {"height": 384, "width": 384}},
    "SiglipImageProcessor": {**_ALL, **_HALF, **_BOTH, "default_to_square": False},
    "Siglip2ImageProcessor": {
        **_ALL,
        **_HALF,
        "resample": 2,
        "patch_size": 16,
        "max_num_patches": 256,
    },
    "ViTImageProcessor": {**_ALL, **_HALF, **_BOTH, "resample": 2},
    "DeiTImageProcessor": {
        **_ALL,
        **_HALF,
        **_CROP,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
    },
    "ConvNextImageProcessor": {
        **_ALL,
        **_HALF,
        "size": {"shortest_edge": 384},
        "default_to_square": False,
        "crop_pct": 224 / 256,
    },
    "EfficientNetImageProcessor": {
        **_ALL,
        **_HALF,
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "rescale_offset": False,
        "include_top": True,
    },
}
#: The class of a file that names none, by the model's `model_type`. AutoImageProcessor knows none
#: for image towers alone, and there it is that of the whole model.
_OF_MODELS = {
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "siglip2_vision_model": "Siglip2ImageProcessor",
    "chinese_clip": "ChineseCLIPImageProcessor",
    "chinese_clip_vision_model": "ChineseCLIPImageProcessor",
}
#: Options of single classes that change pixels in a way that no ``preprocess_cfg`` has.
_REFUSED = {
    "rescale_offset": "EfficientNetImageProcessor",
    "include_top": "EfficientNetImageProcessor",
    "use_square_size": "CLIPImageProcessor",
}
#: The keys that a size can have, together.
_SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
)
#: Means and standard deviations of models are below 1000.
_MAX_NUMBER = 1e6
#: From this size on, ConvNeXT's processor scales both sides and crops nothing.
_CONVNEXT_SQUASHES = 384


def read_processor(
    processor_file: str | os.PathLike[str], image_size: int, model_type: str = "clip"
) -> Config | None:
    """Return open_clip's ``preprocess_cfg`` for a ``preprocessor_config.json``.

    The arguments are `to_preprocess_config`'s. ``None`` is for a ``processor_config.json`` that has
    no `image_processor`, and so tells nothing of images.

    Raises:
        ArchitectureError: It is no JSON object, or prepares images as open_clip cannot.
        UnsafeCheckpointError: It asks for remote code.
    """
    try:
        content = read_object(processor_file)
        if Path(processor_file).name == PROCESSOR_NAMES[1] and "image_processor" not in content:
            return None
        try:
            return to_preprocess_config(content, image_size, model_type)
        except ArchitectureError as error:
            raise ArchitectureError(
                f"{error}; mend the file, or remove it and tell how images are prepared with "
                "image_mean=, image_std=, interpolation= and resize_mode="
            ) from error
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(processor_file)}: {error}") from error


def to_preprocess_config(
    config: Mapping[str, Any], image_size: int, model_type: str = "clip"
) -> Config:
    """Return open_clip's ``preprocess_cfg`` for the content of a ``preprocessor_config.json``.

    config: that file's object, or the `image_processor` of a ``processor_config.json``.
    image_size: what the model takes, in pixels. model_type: that of the model's ``config.json``,
    which tells the class of a processor that does not name its own.

    Raises:
        ArchitectureError: It prepares images in a way that open_clip's transform does not have, or
            that transformers does not know.
        UnsafeCheckpointError: It asks for remote code.
    """
    config = config.get("image_processor", config)
    if not isinstance(config, Mapping):
        raise ArchitectureError(f"its image_processor is {quote(config)}; expected a JSON object")
    kind = _class_of(config, model_type)
    config = {**DEFAULTS[kind], **config}
    for step in ("do_resize", "do_normalize", "do_rescale"):
        if not _flag(config, step):
            raise ArchitectureError(f"its image processor has {step} off; expected it to be on")
    factor = config["rescale_factor"]
    if type(factor) not in (int, float) or not abs(factor * 255 - 1) <= 1e-6:
        raise ArchitectureError(f"its image processor scales by {_shown(factor)}; expected 1/255")
    number = config["resample"]
    if type(number) is not int or number not in _RESAMPLING:
        raise ArchitectureError(
            f"its image processor resizes with PIL's filter {_shown(number)}; expected one of "
            + ", ".join(f"{key} ({name})" for key, name in _RESAMPLING.items())
        )
    for key, of in _REFUSED.items():
        if kind == of and config.get(key):
            raise ArchitectureError(
                f"its image processor, {kind}, has {key} = {_shown(config[key])}; expected false"
            )
    resize_mode = _resize_mode(kind, config, image_size)
    square = {"height": image_size, "width": image_size}
    padded = config.get("pad_size")
    if config.get("do_pad") and padded is not None and _size("pad_size", padded) != square:
        raise ArchitectureError(
            f"its image processor pads to {quote(padded)}; expected images of {image_size} pixels"
        )
    return {
        "mean": _channels(config, "image_mean"),
        "std": _channels(config, "image_std"),
        "interpolation": _RESAMPLING[number],
        "resize_mode": resize_mode,
        "library": "transformers",
    }


def _class_of(config: Mapping[str, Any], model_type: str) -> str:
    """Return the name of the class that AutoImageProcessor takes, without that of its backend."""
    for key in ("AutoImageProcessor", "AutoFeatureExtractor"):
        asked = config.get("auto_map")
        if isinstance(asked, Mapping) and asked.get(key):
            raise UnsafeCheckpointError(
                f"its image processor asks for code of its own (auto_map has {key}); "
                "expected a class of transformers alone: remove auto_map if that is meant"
            )
    name = config.get("image_processor_type")
    if name is None and config.get("feature_extractor_type") is not None:
        name = str(config["feature_extractor_type"]).replace("FeatureExtractor", "ImageProcessor")
    if name is None:
        return _OF_MODELS.get(model_type, "CLIPImageProcessor")
    plain = name.removesuffix("Fast").removesuffix("Pil") if isinstance(name, str) else ""
    if plain not in DEFAULTS:
        raise ArchitectureError(
            f"its image processor is a {quote(name)}; expected one of {', '.join(DEFAULTS)}"
        )
    return plain


def _resize_mode(kind: str, config: Mapping[str, Any], image_size: int) -> str:
    """Return open_clip's name for how an image becomes square."""
    square = {"height": image_size, "width": image_size}
    if kind == "Siglip2ImageProcessor":
        # Siglip2Model takes as many patches as fit, of an image of any proportions. A square image
        # of the model's largest size has the same pixels here and there. Others are squashed here.
        patch, most = config["patch_size"], config["max_num_patches"]
        if type(patch) is not int or type(most) is not int or _side(most) * patch != image_size:
            raise ArchitectureError(
                f"its image processor makes at most {_shown(most)} patches of {_shown(patch)} "
                f"pixels; expected those of a square image of {image_size} pixels"
            )
        return "squash"
    size = _size("size", config["size"], to_square=_flag(config, "default_to_square"))
    crop = _size("crop_size", config["crop_size"]) if _flag(config, "do_center_crop") else None
    if kind == "ConvNextImageProcessor":
        size, crop = _of_convnext(size, crop, config["crop_pct"])
    if size == square and crop in (None, square):
        return "squash"  # both sides, whatever the proportions; a crop then changes nothing
    if size == {"shortest_edge": image_size} and crop == square:
        return "shortest"
    raise ArchitectureError(
        f"its image processor resizes to {size}"
        + (f" and crops to {crop}" if crop else "")
        + f"; expected the shorter side and the crop to be {image_size}, or both sides"
    )


def _of_convnext(
    size: dict[str, int], crop: dict[str, int] | None, share: Any
) -> tuple[dict[str, int], dict[str, int] | None]:
    """Return the size and the crop that ConvNeXT's processor makes of those in its file."""
    edge = size.get("shortest_edge")
    if edge is None or len(size) > 1:
        raise ArchitectureError(
            f"its image processor has size = {size}; expected a shortest_edge alone"
        )
    if edge >= _CONVNEXT_SQUASHES:
        return {"height": edge, "width": edge}, crop
    if type(share) not in (int, float) or not 0.01 <= share <= 1:
        raise ArchitectureError(
            f"its image processor has crop_pct = {_shown(share)}; expected a number in 0.01..1"
        )
    own = {"height": edge, "width": edge}
    return {"shortest_edge": int(edge / share)}, own if crop in (None, own) else crop


def _shown(value: Any) -> str:
    """Return a value of a file for a message."""
    return str(value) if type(value) in (int, float, bool, type(None)) else quote(value)


def _side(patches: int) -> int:
    """Return the side of the largest square of at most so many patches."""
    return math.isqrt(max(patches, 0))


def _flag(config: Mapping[str, Any], key: str) -> bool:
    """Return whether a step is on; null is off, as in transformers."""
    value = config[key]
    if value is not None and type(value) is not bool:
        raise ArchitectureError(
            f"its image processor has {key} = {_shown(value)}; expected true or false"
        )
    return bool(value)


def _size(key: str, value: Any, *, to_square: bool = True) -> dict[str, int]:
    """Return a size as transformers' `get_size_dict` does.

    to_square: Whether one number means both sides and not the shorter one.
    """
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif type(value) is int:
        value = {"height": value, "width": value} if to_square else {"shortest_edge": value}
    known = isinstance(value, Mapping) and set(value) in _SIZES
    if not known or any(type(one) is not int or one < 1 for one in value.values()):
        raise ArchitectureError(
            f"its image processor has {key} = {_shown(value)}; expected a number of pixels, a "
            "height and a width, or a shortest_edge"
        )
    return dict(value)


def _channels(config: Mapping[str, Any], key: str) -> list[float]:
    """Return the three numbers of a mean or a standard deviation; one stands for all three."""
    value = config[key]
    values = list(value) if isinstance(value, list | tuple) else [value]
    numbers = all(type(one) in (int, float) and abs(one) <= _MAX_NUMBER for one in values)
    if not numbers or len(values) not in (1, 3) or (key == "image_std" and min(values) <= 0):
        positive = " positive" if key == "image_std" else ""
        raise ArchitectureError(
            f"its image processor has {key} = {_shown(value)}; expected three{positive} numbers, "
            "or one for all channels"
        )
    return values if len(values) == 3 else values * 3
