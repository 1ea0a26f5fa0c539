"""How an image processor of transformers prepares images, as open_clip's ``preprocess_cfg``.

Source: the defaults are those of ``image_processing_*.py`` in transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from pydetox.checkpoints.transformers_files import read_object
from pydetox.errors import ArchitectureError, CheckpointError

Config = dict[str, Any]

#: PIL's numbers of the filters that open_clip knows by name.
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}

#: What SigLIP's processor does where its file is silent; CLIP's is the default of all others.
_SIGLIP: Config = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


def read_processor(processor_file: str | os.PathLike[str], image_size: int) -> Config:
    """Return open_clip's ``preprocess_cfg`` for a ``preprocessor_config.json``.

    Raises:
        ArchitectureError: It is no JSON object, or prepares images as open_clip cannot.
    """
    try:
        return to_preprocess_config(read_object(processor_file), image_size)
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(processor_file)}: {error}") from error


def to_preprocess_config(config: Mapping[str, Any], image_size: int) -> Config:
    """Return open_clip's ``preprocess_cfg`` for the content of a ``preprocessor_config.json``.

    config: that file's object, or the `image_processor` of a ``processor_config.json``.
    image_size: what the model takes, in pixels.

    Raises:
        ArchitectureError: It prepares images in a way that open_clip's transform does not have.
    """
    config = config.get("image_processor", config)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    if kind.startswith("Siglip2") or "max_num_patches" in config:
        config = _with_one_size(config, image_size)
    elif kind.startswith("Siglip"):
        config = {**_SIGLIP, **config}
    for step in ("do_resize", "do_normalize", "do_rescale"):
        if config.get(step, True) is not True:
            raise ArchitectureError(f"its image processor has {step} off; expected it to be on")
    factor = config.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ArchitectureError(f"its image processor scales by {factor}; expected 1/255")
    number = config.get("resample", 3)
    if number not in _RESAMPLING:
        raise ArchitectureError(
            f"its image processor resizes with PIL's filter {number}; expected one of "
            + ", ".join(f"{key} ({name})" for key, name in _RESAMPLING.items())
        )
    size = config.get("size", {"shortest_edge": 224})
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    crop = config.get("crop_size", {"height": 224, "width": 224})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    square = {"height": image_size, "width": image_size}
    crops = config.get("do_center_crop", True) is True
    if size == square and (not crops or crop == square):
        resize_mode = "squash"  # both sides, whatever the proportions; a crop then changes nothing
    elif size == {"shortest_edge": image_size} and crops and crop == square:
        resize_mode = "shortest"
    else:
        raise ArchitectureError(
            f"its image processor resizes to {size}"
            + (f" and crops to {crop}" if crops else "")
            + f"; expected the shorter side and the crop to be {image_size}, or both sides"
        )
    return {
        "mean": list(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        "std": list(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        "interpolation": _RESAMPLING[number],
        "resize_mode": resize_mode,
    }


def _with_one_size(config: Mapping[str, Any], image_size: int) -> Config:
    """Return the configuration of a processor that keeps proportions, for square images.

    Siglip2Model takes as many patches as fit, of an image of any proportions. A square image of the
    model's largest size has the same pixels here and there. Others are squashed here.
    """
    patch, most = config.get("patch_size", 16), config.get("max_num_patches", 256)
    if type(patch) is not int or type(most) is not int or math.isqrt(most) * patch != image_size:
        raise ArchitectureError(
            f"its image processor makes at most {most} patches of {patch} pixels; expected "
            f"those of a square image of {image_size} pixels"
        )
    square = {"height": image_size, "width": image_size}
    return {"resample": 2, **_SIGLIP, **config, "size": square}
