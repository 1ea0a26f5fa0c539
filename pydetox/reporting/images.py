"""Small images as PNG data URIs, enlarged so that single pixels can be seen."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError


def png_data_uri(image: NDArray[Any], *, min_size: int = 128) -> str:
    """Return `image` as "data:image/png;base64,...".

    image: uint8 [H, W, 3] (RGB) or [H, W] (grey). It is enlarged by the smallest whole factor that
    makes the shorter side at least `min_size` pixels, each pixel becoming a square block. Raises
    DataError for any other type or shape.
    """
    pixels = np.asarray(image)
    if (
        pixels.dtype != np.uint8
        or pixels.size == 0
        or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3))
    ):
        raise DataError(
            f"report image is {pixels.dtype} {list(pixels.shape)}; "
            "expected uint8 [H, W, 3] or [H, W]"
        )
    factor = max(1, -(-min_size // min(pixels.shape[:2])))
    enlarged = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(enlarged).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
