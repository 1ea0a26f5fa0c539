"""The random choices of a search for patches or blends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..rng import generator
from .configuration import FAMILIES, InversionConfig


def starting_point(
    config: InversionConfig, count: int, image_size: int, image_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the random choices of a search: initial logits, and the images of each step.

    Returns:
        The mask logits, float32 [count, H, W]; the pattern logits, float32 [count, 3, H, W]; and
        the indices of the images, int64 [steps, B]. The indices pass over all images, in a new
        random order each time. All of them are on the CPU and come from numpy's generator, so they
        are the same on every platform and device.
    """
    rng = generator("inversion.start", config.seed, config.family)

    def normal(shape: tuple[int, ...], centre: float) -> Tensor:
        values = rng.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(values).mul_(0.5).add_(centre)

    centre = (
        FAMILIES[config.family]
        if config.advanced.initial_mask is None
        else config.advanced.initial_mask
    )
    drawn = 1 if config.advanced.shared_start else count
    mask = normal((drawn, image_size, image_size), centre)
    if config.family == "blend":
        mask.fill_(centre)
    pattern = normal((drawn, 3, image_size, image_size), 0.0)
    if drawn < count:
        mask, pattern = mask.repeat(count, 1, 1), pattern.repeat(count, 1, 1, 1)
    batch = min(config.batch_size, image_count)
    passes = -(-config.steps * batch // image_count)
    order = np.concatenate([rng.permutation(image_count) for _ in range(passes)])
    batches = torch.from_numpy(order[: config.steps * batch].reshape(config.steps, batch))
    return mask, pattern, batches
