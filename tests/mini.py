"""The smallest CLIP that open_clip builds, for tests that need a model but not a good one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pydetox.data import ImageSet, Template
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.key import calibration_key
from pydetox.detect.statistics import Calibration, Detection, detect
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
    """Return four references of which every class has about that P-L1, for each family."""
    count = len(images.class_names or ()) or 1
    rows = tuple(
        tuple(size * (1 + 0.02 * ((2 * r + 3 * c + r * c) % 5)) for c in range(count))
        for r in range(4)
    )
    model = OpenClipModel.from_config(model_config, seed=0)
    session = Session.open(model, images, templates=templates)

    def of(family: TriggerFamily, others: tuple[Calibration, ...] = ()) -> Calibration:
        key = calibration_key(config, session, family)
        return Calibration(rows, key, tuple("abcd"), family=family, others=others)

    first, *rest = config.families
    return of(first, tuple(of(family) for family in rest))


def judge_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scans of untrained models have verdicts: of classes without a trigger, assume the usual.

    Such a model gives one answer to all images, so that a trigger is found for one class only. That
    bears no verdict (see tests/detect), and training better ones takes too long for most tests.
    Processes that a test starts judge as ever.
    """

    def judged(
        sizes: Sequence[float], calibration: Calibration | None, **options: Any
    ) -> Detection:
        if calibration is None or not any(map(math.isfinite, sizes)):
            return detect(sizes, calibration, **options)
        usual = [math.exp(mean) for mean in calibration.mean]
        pairs = list(zip(sizes, usual, strict=True))
        larger = max(size / other for size, other in pairs if math.isfinite(size))
        filled = [
            size if math.isfinite(size) else other * max(larger, 1.0) for size, other in pairs
        ]
        found = detect(filled, calibration, **options)
        best = min(range(len(filled)), key=sizes.__getitem__)
        target = best if options["has_classes"] else None
        return replace(found, p_l1=tuple(sizes), target=target, smallest_p_l1=sizes[best])

    monkeypatch.setattr("pydetox.detect.scan.detect", judged)
