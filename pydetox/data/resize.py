"""How an image of any size becomes a model's input, and which images are too large to decode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DataError

#: Images of more pixels than this, as stored or after resizing, are refused: a few kilobytes of a
#: crafted PNG can decode to gigabytes. The number is Pillow's own default warning level (a quarter
#: of a gigabyte of RGB).
MAX_PIXELS = 89_478_485

#: The longest side that images are scaled to.
MAX_SIDE = 9_459  # its square has MAX_PIXELS pixels at most

#: open_clip's `random` means bicubic outside training, where nothing is random.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "random")

#: `shortest` scales the shorter side and crops. `longest` scales the longer side and pads. `squash`
#: scales both sides, for any proportions.
RESIZE_MODES = ("shortest", "longest", "squash")

#: Whose transform makes the pixels.
LIBRARIES = ("open_clip", "transformers")


@dataclass(frozen=True)
class Resizing:
    """The transform of a picture of any size and mode to RGB pixels of a model's size.

    For `open_clip`, this is its own transform without its last two steps, which turn the pixels
    into normalised floats. It therefore treats palettes, transparency (dropped), grey values above
    255 (clipped) and the EXIF orientation (ignored) as open_clip does.

    For `transformers`, this is what its image processors do on a CPU where torchvision is installed
    (backend "torchvision"). They convert to RGB first and put transparent pictures on white,
    torchvision scales uint8 tensors, and an odd margin is cropped by one pixel less on the left and
    at the top than in open_clip. transformers has no `longest`: open_clip's is taken.

    Attributes:
        image_size: The height and width of the result in pixels.
        interpolation: One of `INTERPOLATIONS`; open_clip itself has no `nearest` and no `lanczos`.
        resize_mode: One of `RESIZE_MODES`.
        fill_color: The grey value of the padding of `longest`, 0..255.
        library: One of `LIBRARIES`.
        resize_size: The length that `resize_mode` scales to, in pixels, before the middle of
            image_size pixels is cut out, as timm and torchvision do; None: image_size itself.
            Pictures that have the model's size are neither scaled nor cut, like arrays of it.

    Raises:
        DataError: A value is none of these.
    """

    image_size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    library: str = "open_clip"
    resize_size: int | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise DataError(f"image_size is {self.image_size}; expected at least 1")
        for what, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("resize_mode", self.resize_mode, RESIZE_MODES),
            ("library", self.library, LIBRARIES),
        ):
            if value not in known:
                raise DataError(
                    f"{what} {value!r} is not known; expected one of {', '.join(known)}"
                )
        if not 0 <= self.fill_color <= 255:
            raise DataError(f"fill_color is {self.fill_color}; expected 0..255")
        if self.resize_size is not None and not 1 <= self.resize_size <= MAX_SIDE:
            raise DataError(f"resize_size is {self.resize_size}; expected 1..{MAX_SIDE}")

    def __call__(self, image: Image.Image, what: str) -> Image.Image:
        """Return the image in RGB, of the model's size.

        Raises DataError, naming `what`, for an image without pixels and for one that is too large
        after scaling.
        """
        width, height = image.size
        if min(width, height) == 0:
            raise DataError(f"{what}: {width}x{height} pixels; expected a size above 0")
        after = (self.image_size, self.image_size)
        if self.resize_mode == "shortest":
            side = self.resize_size or self.image_size
            scaled = int(side * max(width, height) / min(width, height))
            after = (side, scaled) if width <= height else (scaled, side)
            refuse_too_large(*after, f"{what}, scaled to a shorter side of {side}")
        if self.library == "transformers":
            image = _on_white(image)
            if self.resize_mode != "longest":
                return self._as_transformers(image, *after)
        if self.resize_size is not None and image.size == (self.image_size, self.image_size):
            return image.convert("RGB")
        result: Image.Image = self._transform(image)
        return result

    def _as_transformers(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return an RGB image, scaled to width and height, and its middle."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        if self.interpolation == "lanczos":  # not in every torchvision for tensors
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        names = {"nearest": "nearest-exact", "lanczos": "nearest-exact", "random": "bicubic"}
        mode = InterpolationMode(names.get(self.interpolation, self.interpolation))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()[None]
        pixels = functional.resize(pixels, [height, width], interpolation=mode, antialias=True)
        side = self.image_size
        middle = functional.crop(pixels, (height - side) // 2, (width - side) // 2, side, side)
        return Image.fromarray(middle[0].permute(1, 2, 0).contiguous().numpy())

    @cached_property
    def _transform(self) -> Any:
        from open_clip import image_transform  # takes seconds to import
        from open_clip.transform import CenterCropOrPad
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode

        ours = self.interpolation in ("nearest", "lanczos")
        whole = image_transform(
            self.resize_size or self.image_size,
            is_train=False,
            resize_mode=self.resize_mode,
            interpolation="bicubic" if ours else self.interpolation,
            fill_color=self.fill_color,
        )
        if ours:
            whole.transforms[0].interpolation = InterpolationMode(self.interpolation)
        steps = whole.transforms[:-2]
        if self.resize_size is not None:
            crop: Any = CenterCrop(self.image_size)
            if self.resize_mode == "longest":
                crop = CenterCropOrPad(self.image_size, fill=self.fill_color)
            steps = [steps[0], crop, steps[-1]]  # scaling, crop, RGB
        return Compose(steps)


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB, what is transparent in it on white (transformers' convert_to_rgb)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def refuse_too_large(width: int, height: int, what: str) -> None:
    """Raise DataError if an image has more than MAX_PIXELS pixels; call this before decoding."""
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{what}: {width}x{height} pixels; expected at most {MAX_PIXELS:,} pixels "
            "(decompression bomb?)"
        )
