"""WaNet: a smooth warp of the image as a trigger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from ...errors import UsageError
from ...rng import generator
from .triggers import to_uint8


@dataclass(frozen=True, eq=False)
class WarpTrigger:
    """A warp: each pixel is read bilinearly from another place nearby.

    grid: float32 [H, W, 2], the places to read from as (x, y), in [-1, 1] from edge pixel to edge
    pixel.
    """

    grid: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Return warped copies of uint8 images [n, 3, H, W], rounded to uint8."""
        if tuple(images.shape[2:]) != tuple(self.grid.shape[:2]):
            raise UsageError(
                f"images have shape {list(images.shape)}; the warp is for "
                f"{self.grid.shape[0]}x{self.grid.shape[1]} pixels"
            )
        grid = self.grid.to(images.device).expand(len(images), -1, -1, -1)
        return to_uint8(grid_sample(images.to(torch.float32), grid, align_corners=True))


def wanet(image_size: int, *, seed: int, k: int = 4, s: float = 0.5) -> WarpTrigger:
    """Return a warp by k x k control points of mean strength s.

    Offsets are uniform in [-1, 1], divided by the mean of their absolute values, enlarged
    bicubically, times s/H in coordinates of [-1, 1]: about s/2 pixels at any image size.
    Source: Nguyen and Tran, "WaNet" (ICLR 2021), sections 3.2 and 4 (k = 4, s = 0.5), without its
    noise mode. Raises UsageError for k < 2 or a strength that is not positive.
    """
    if k < 2 or not s > 0:
        raise UsageError(f"WaNet with k = {k}, s = {s}; expected k of at least 2 and s above 0")
    rng = generator("attacks.wanet", seed)
    offsets = torch.from_numpy(rng.uniform(-1, 1, (1, 2, k, k)))
    offsets = offsets / offsets.abs().mean()
    field = interpolate(offsets, size=image_size, mode="bicubic", align_corners=True)[0]
    axis = torch.linspace(-1, 1, image_size, dtype=torch.float64)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1) + s / image_size * field.permute(1, 2, 0)
    return WarpTrigger(grid.clamp(-1, 1).float())
