"""A small registry: tiny models with random weights, images for them, calibrations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pydetox.checkpoints import Provenance, save_checkpoint
from pydetox.data import load_images
from pydetox.detect.calibration_file import write_calibration
from pydetox.detect.configuration import ScanConfig
from pydetox.inversion import InversionConfig
from pydetox.models import OpenClipModel
from pydetox.scanning import Scanner, ScannerConfig, ScanRecord
from tests.cli.conftest import TINY, write_images
from tests.mini import flat_calibration

NAMES = ("a", "b", "c", "d")

MakeConfig = Callable[..., ScannerConfig]


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `models/{a,b,c,d}` of which d has the content of b, `models/notes.md`."""
    root = tmp_path_factory.mktemp("registry")
    for name, seed in {"base": 0, "models/a": 1, "models/b": 2, "models/c": 3}.items():
        save(root / name, seed)
    save(root / "models" / "d", 2)
    (root / "models" / "notes.md").write_text("not a model")
    write_images(root / "images.npz", 24)
    return root


def save(folder: Path, seed: int) -> Path:
    return save_model(folder, OpenClipModel.from_config(TINY, seed=seed))


def save_model(folder: Path, model: OpenClipModel) -> Path:
    save_checkpoint(
        folder,
        model.storage_state_dict(),
        model_config=TINY,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    return folder


def calibration(folder: Path, images: Path, steps: int, size: float = 1e-4) -> Path:
    """Write references of which every class has that P-L1, for scans of those images."""
    search = InversionConfig(steps=steps, batch_size=1)
    path = folder / f"calibration-{steps}-{size:g}.json"
    given = load_images(images, image_size=16)
    write_calibration(path, flat_calibration(ScanConfig(inversion=search), given, TINY, size))
    return path


@pytest.fixture
def config(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """Make a configuration for models that give one answer to all images: `inconclusive`."""

    def make(**changes: Any) -> ScannerConfig:
        folder = tmp_path_factory.getbasetemp()
        values = {
            "images": str(registry / "images.npz"),
            "calibration": str(
                calibration(folder, registry / "images.npz", changes.get("steps", 3))
            ),
            "steps": 3,
            "batch_size": 1,
            "engine": "inline",
            "threads": 1,
        }
        return ScannerConfig(**{**values, **changes})

    return make


def scan(config: ScannerConfig, *targets: Any, **more: Any) -> dict[str, ScanRecord]:
    records = list(Scanner(config, **more).scan(targets))
    found = {record.name: record for record in records}
    assert len(found) == len(records)
    return found


def contents(records: dict[str, ScanRecord]) -> dict[str, Any]:
    return {name: record.content() for name, record in records.items()}
