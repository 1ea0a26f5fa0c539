"""Triggers as pictures: for reports and for PNG files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data import ImageSet
from ..detect.result import ScanResult
from ..inversion import RecoveredTrigger
from ..rng import child_seed

#: The pictures of a trigger, and what they are called.
PICTURES = {"mask": "mask", "pattern": "mask × pattern", "stamped": "stamped image"}


def example_image(images: ImageSet, seed: int) -> Tensor:
    """Return the clean image that triggers are shown on, uint8 [3, H, W]: one at random."""
    return images.sample(1, child_seed("report.example", seed)).images.squeeze(0)


def trigger_pictures(trigger: RecoveredTrigger, example: Tensor) -> dict[str, NDArray[np.uint8]]:
    """Return mask [H, W], pattern [H, W, 3] and the stamped example [H, W, 3], all uint8.

    example: a clean image, uint8 [3, H, W]. The pattern is shown as far as the mask lets it
    through, because the rest of it has no effect.
    """
    visible = trigger.mask * trigger.pattern
    return {
        "mask": _bytes(trigger.mask),
        "pattern": _bytes(visible),
        "stamped": _array(trigger(example[None])[0]),
    }


def weakest_trigger(scan: ScanResult) -> int:
    """Return the index of the smallest trigger of the most suspect class, of a scan's inversion."""
    restarts = len(scan.inversion) // max(1, len(scan.detection.p_l1))
    first = 0
    if scan.objective == "targeted":
        sizes, target = scan.detection.p_l1, scan.detection.target
        weakest = target if target is not None else int(np.argmin(sizes))
        first = weakest * restarts
    return first + int(scan.inversion.p_l1[first : first + restarts].argmin())


def report_pictures(scan: ScanResult, example: Tensor, caption: str) -> list[dict[str, Any]]:
    """Return the "triggers" of a report: those of the most suspect class of a scan."""
    name = f"{caption}, {scan.target_name}" if scan.target_name else caption
    pictures = trigger_pictures(scan.inversion.trigger(weakest_trigger(scan)), example)
    return [{"caption": f"{name}: {PICTURES[k]}", "image": v} for k, v in pictures.items()]


def png(image: NDArray[np.uint8]) -> bytes:
    """Return an image, uint8 [H, W] or [H, W, 3], as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    return _array((255 * values).round().to(torch.uint8))


def _array(image: Tensor) -> NDArray[np.uint8]:
    channels_last = image.permute(1, 2, 0) if image.ndim == 3 else image
    array: NDArray[np.uint8] = channels_last.contiguous().numpy()
    return array
