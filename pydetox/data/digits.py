"""The UCI handwritten digits, an image set that is part of the scikit-learn package."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .image_set import ImageSet

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_digits(image_size: int = 32) -> ImageSet:
    """Return the 1,797 UCI digits, drawn light on black, as RGB images of that height and width.

    The source is 8x8 grey values 0..16 (Alpaydin and Kaynak, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, 1998); they are scaled to 0..255 and enlarged
    bicubically. Nothing is downloaded. Raises DataError when scikit-learn is not installed.
    """
    if image_size < 1:
        raise DataError(f"digits: image_size is {image_size}; expected at least 1")
    try:
        from sklearn.datasets import load_digits as load_uci_digits
    except ImportError as error:
        raise DataError(
            "digits: scikit-learn, which carries these images, is not installed; "
            'run: pip install "pydetox[digits]"'
        ) from error
    data = load_uci_digits()
    grey = np.floor(np.asarray(data.images) * (255 / 16) + 0.5).astype(np.uint8)
    size = (image_size, image_size)
    drawn = np.stack(
        [
            np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC))
            for digit in grey
        ]
    )
    images = torch.from_numpy(drawn)[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(np.asarray(data.target, dtype=np.int64))
    return ImageSet(images, labels, DIGIT_NAMES, "digits")
