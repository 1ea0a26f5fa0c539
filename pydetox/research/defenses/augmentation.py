"""Random views of images, for self-supervision."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


def random_views(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Return one random view per image.

    A view may be mirrored. It is shifted by up to an eighth of the side, and the edge is repeated.
    Its brightness changes by up to 0.2, and its contrast by a factor of 0.6 to 1.4. A square of a
    quarter of the side is set to 0.5. pixels: float [n, 3, H, W] in [0, 1], like the result. rng:
    The random stream.
    """
    count, _, height, width = pixels.shape
    reach = max(1, min(height, width) // 8)
    padded = pad(pixels, (reach, reach, reach, reach), mode="replicate")
    hole = max(1, min(height, width) // 4)
    views = torch.empty_like(pixels)
    for k in range(count):
        top, left = (int(v) for v in rng.integers(0, 2 * reach + 1, 2))
        view = padded[k, :, top : top + height, left : left + width]
        if rng.random() < 0.5:
            view = view.flip(-1)
        brightness, contrast = rng.uniform(-0.2, 0.2), rng.uniform(0.6, 1.4)
        mean = view.mean()
        views[k] = ((view - mean) * contrast + mean + brightness).clamp(0, 1)
        top, left = int(rng.integers(height - hole + 1)), int(rng.integers(width - hole + 1))
        views[k, :, top : top + hole, left : left + hole] = 0.5
    return views
