"""How an image of any size becomes what a model takes, and what is too large to try."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from ..errors import DataError

#: Images of more pixels than this, as stored or after resizing, are refused: a few kilobytes of a
#: crafted PNG can decode to gigabytes. The number is Pillow's own default warning level (a quarter
#: of a gigabyte of RGB).
MAX_PIXELS = 89_478_485

#: `random` is what open_clip calls bicubic where nothing is random, that is, outside of training.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "random")

#: `shortest` scales the shorter side and crops, `longest` scales the longer side and pads, `squash`
#: scales both sides, whatever the proportions.
RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True)
class Resizing:
    """From a picture of any size and mode to RGB pixels of a model's size, as open_clip does it.

    It is open_clip's own transform without its last two steps, which make normalised floats of the
    pixels. What open_clip's transform does to a palette, to transparency (dropped), to grey values
    above 255 (cut off) and to EXIF orientation (ignored) is therefore done here too.

    Attributes:
        image_size: Height and width of the result in pixels.
        interpolation: One of `INTERPOLATIONS`; open_clip has no `nearest` and no `lanczos`.
        resize_mode: One of `RESIZE_MODES`.
        fill_color: 0..255, the grey of what `longest` pads with.

    Raises DataError for a value that is none of these.
    """

    image_size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise DataError(f"image_size is {self.image_size}; expected at least 1")
        for what, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("resize_mode", self.resize_mode, RESIZE_MODES),
        ):
            if value not in known:
                raise DataError(
                    f"{what} {value!r} is not known; expected one of {', '.join(known)}"
                )
        if not 0 <= self.fill_color <= 255:
            raise DataError(f"fill_color is {self.fill_color}; expected 0..255")

    def __call__(self, image: Image.Image, what: str) -> Image.Image:
        """Return the image in RGB, of the model's size.

        Raises DataError, naming `what`, for an image without pixels and for one that is too large
        after scaling.
        """
        width, height = image.size
        if min(width, height) == 0:
            raise DataError(f"{what}: {width}x{height} pixels; expected a size above 0")
        if self.resize_mode == "shortest":
            scaled = int(self.image_size * max(width, height) / min(width, height))
            after = (self.image_size, scaled) if width <= height else (scaled, self.image_size)
            refuse_too_large(*after, f"{what}, scaled to a shorter side of {self.image_size}")
        result: Image.Image = self._transform(image)
        return result

    @cached_property
    def _transform(self) -> Any:
        from open_clip import image_transform  # takes seconds to import
        from torchvision.transforms import Compose, InterpolationMode

        ours = self.interpolation in ("nearest", "lanczos")
        whole = image_transform(
            self.image_size,
            is_train=False,
            resize_mode=self.resize_mode,
            interpolation="bicubic" if ours else self.interpolation,
            fill_color=self.fill_color,
        )
        if ours:
            whole.transforms[0].interpolation = InterpolationMode(self.interpolation)
        return Compose(whole.transforms[:-2])


def refuse_too_large(width: int, height: int, what: str) -> None:
    """Raise DataError if an image has more than MAX_PIXELS pixels; call this before decoding."""
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{what}: {width}x{height} pixels; expected at most {MAX_PIXELS:,} pixels "
            "(decompression bomb?)"
        )
