"""The smallest CLIP that open_clip builds, for tests that need a model but not a good one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pydetox.data import ImageSet, Template
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.key import calibration_key
from pydetox.detect.statistics import Calibration
from pydetox.inversion import TriggerFamily
from pydetox.models import OpenClipModel
from pydetox.session import Session

CLASS_NAMES = ("cat", "dog", "owl")

MINI_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def mini_model(seed: int = 0) -> OpenClipModel:
    return OpenClipModel.from_config(MINI_CONFIG, seed=seed, name="mini")


def mini_images(count: int = 24, *, seed: int = 0, labels: bool = True) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ImageSet(
        images, torch.arange(count) % len(CLASS_NAMES) if labels else None, CLASS_NAMES, "mini"
    )


def flat_calibration(
    config: ScanConfig,
    images: ImageSet,
    model_config: dict[str, Any],
    size: float,
    *,
    templates: Sequence[Template] | None = None,
) -> Calibration:
    """Return two references of which every class has that P-L1, for each family of the scan."""
    row = (size,) * (len(images.class_names or ()) or 1)
    model = OpenClipModel.from_config(model_config, seed=0)
    session = Session.open(model, images, templates=templates)

    def of(family: TriggerFamily, others: tuple[Calibration, ...] = ()) -> Calibration:
        key = calibration_key(config, session, family)
        return Calibration((row, row), key, ("one", "two"), family=family, others=others)

    first, *rest = config.searched
    return of(first, tuple(of(family) for family in rest))
