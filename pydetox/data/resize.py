"""How an image of any size becomes a square one, and what is too large to try."""

from __future__ import annotations

from PIL import Image

from ..errors import DataError

#: Images of more pixels than this, as stored or after resizing, are refused: a few kilobytes of a
#: crafted PNG can decode to gigabytes. The number is Pillow's own default warning level (a quarter
#: of a gigabyte of RGB).
MAX_PIXELS = 89_478_485

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def interpolation_filter(name: str) -> Image.Resampling:
    """Return Pillow's filter of that name; a name not in INTERPOLATIONS is a DataError."""
    if name not in INTERPOLATIONS:
        raise DataError(
            f"interpolation {name!r} is not known; expected one of {', '.join(INTERPOLATIONS)}"
        )
    return INTERPOLATIONS[name]


def refuse_too_large(width: int, height: int, what: str) -> None:
    """Raise DataError if an image has more than MAX_PIXELS pixels; call this before decoding."""
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{what}: {width}x{height} pixels; expected at most {MAX_PIXELS:,} pixels "
            "(decompression bomb?)"
        )


def resize_and_crop(
    image: Image.Image, image_size: int, resample: Image.Resampling, what: str
) -> Image.Image:
    """Scale the shorter side to image_size, then cut out the centre square.

    This is CLIP's own preprocessing, done by torchvision's Resize and CenterCrop as open_clip does
    it, so that a model sees exactly the pixels that open_clip would give it. Raises DataError,
    naming `what`, for an image without pixels and for one that is too large after scaling.
    """
    from torchvision.transforms import InterpolationMode  # takes a second to import
    from torchvision.transforms import functional as transforms

    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    if shorter == 0:
        raise DataError(f"{what}: {width}x{height} pixels; expected a size above 0")
    scaled = int(image_size * longer / shorter)
    after = (image_size, scaled) if width <= height else (scaled, image_size)
    refuse_too_large(*after, f"{what}, scaled to a shorter side of {image_size}")
    mode = InterpolationMode(resample.name.lower())
    square: Image.Image = transforms.center_crop(
        transforms.resize(image, image_size, mode), image_size
    )
    return square
