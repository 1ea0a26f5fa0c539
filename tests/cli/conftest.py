"""A tiny CLIP with random weights as files, clean images for it, and the commands in-process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from pydetox.checkpoints import Provenance, save_checkpoint
from pydetox.cli import cli
from pydetox.models import OpenClipModel
from tests.mini import flat_calibration, judge_one_class

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 1,
        "layers": 1,
    },
}
CLASSES = ("cat", "dog", "cow")
FAST = ("--steps", "3", "--batch-size", "1")
FAST_REFERENCES = (
    *("--references", "2", "--reference-learning-rate", "1e-5", "--reference-epochs", "1"),
)

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_model() -> OpenClipModel:
    return OpenClipModel.from_config(TINY, seed=0, name="tiny")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: OpenClipModel) -> Path:
    """What the user has: checkpoints `base` and `suspect`, `images.npz`, `config.json`."""
    folder = tmp_path_factory.mktemp("cli")
    models = {"base": tiny_model, "suspect": OpenClipModel.from_config(TINY, seed=1)}
    for name, model in models.items():
        save_checkpoint(
            folder / name,
            model.storage_state_dict(),
            model_config=TINY,
            preprocess_config=None,
            provenance=Provenance(method="test"),
        )
    write_images(folder / "images.npz", 24)
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def write_images(path: Path, count: int, size: int = 16, **changes: Any) -> Path:
    # Grey ones and white ones: the suspect's random weights tell them apart, and with one image in
    # a batch (FAST) the first step of a search has already found a trigger into the class it gets.
    rng = np.random.default_rng(0)
    shade = np.where(np.arange(count) // len(CLASSES) % 2, 252, 125)[:, None, None, None]
    arrays = {
        "images": (shade + rng.integers(0, 4, (count, size, size, 3))).astype(np.uint8),
        "labels": np.arange(count) % len(CLASSES),
        "class_names": np.array(CLASSES),
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.fixture
def images(folder: Path) -> tuple[str, str]:
    return ("--images", str(folder / "images.npz"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options that name two reference models."""
    folder, given = tmp_path_factory.mktemp("references"), []
    for seed in (2, 3):
        save_checkpoint(
            folder / f"{seed}",
            OpenClipModel.from_config(TINY, seed=seed).storage_state_dict(),
            model_config=TINY,
            preprocess_config=None,
            provenance=Provenance(method="test"),
        )
        given += ["--reference-model", str(folder / f"{seed}")]
    return tuple(given)


@pytest.fixture
def run() -> Run:
    """`run("scan", path, ...)`; an exception that is not an exit fails the test."""
    before = torch.get_num_threads()

    def run(*args: object, **options: Any) -> Result:
        result = CliRunner().invoke(cli, [str(arg) for arg in args], **options)
        torch.set_num_threads(before)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


def calibration_file(
    path: Path, images: Path, size: float, classes: tuple[str, ...] = CLASSES
) -> Path:
    """Write a calibration for FAST scans of those images, with that P-L1 for every class."""
    from pydetox.data import load_images
    from pydetox.detect.calibration_file import write_calibration
    from pydetox.detect.configuration import ScanConfig
    from pydetox.inversion import InversionConfig

    config = ScanConfig(inversion=InversionConfig(steps=3, batch_size=1))
    given = replace(load_images(images, image_size=16), class_names=classes)
    write_calibration(path, flat_calibration(config, given, TINY, size))
    return path


@pytest.fixture
def says_clean(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A calibration beside which no trigger of FAST is small."""
    judge_one_class(monkeypatch)
    return calibration_file(tmp_path / "clean.json", folder / "images.npz", 1e-4)


@pytest.fixture
def says_backdoored(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A calibration beside which every trigger of FAST is small."""
    judge_one_class(monkeypatch)
    return calibration_file(tmp_path / "backdoored.json", folder / "images.npz", 0.9)


def error_line(result: Result) -> str:
    """The one line of stderr."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
