"""What commands say and record about how images are prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pydetox.checkpoints import Provenance, save_checkpoint
from pydetox.models import OpenClipModel

from .conftest import FAST, TINY, Run

SQUASH = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"} | {
    "resize_mode": "squash"
}
OPEN_CLIP = {"fill_color": 0, "library": "open_clip"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (32, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def bare(tmp_path: Path, tiny_model: OpenClipModel) -> Path:
    path = tmp_path / "bare.pt"
    torch.save(tiny_model.clip.state_dict(), path)
    return path


def folder_of(path: Path, model: OpenClipModel, preprocess: dict[str, Any] | None) -> Path:
    save_checkpoint(
        path,
        model.storage_state_dict(),
        model_config=TINY,
        preprocess_config=preprocess,
        provenance=Provenance(method="test"),
    )
    return path


def measured(run: Run, *args: object) -> tuple[dict[str, Any], list[str]]:
    result = run("eval", *args, "--format", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr.splitlines()


def test_a_folder_is_read_with_its_own_way_and_says_so(
    run: Run, tmp_path: Path, photos: Path, tiny_model: OpenClipModel
) -> None:
    folder = folder_of(tmp_path / "own", tiny_model, SQUASH)
    document, lines = measured(run, folder, "--images", photos)
    assert document["preprocessing"] == SQUASH | {
        **OPEN_CLIP,
        "source": "open_clip_config.json",
    }
    assert (document["warnings"], lines) == ([], [])
    named, lines = measured(run, folder, "--images", photos, "--model", "ViT-B-32")
    assert named["clean_accuracy"] == document["clean_accuracy"]
    assert named["preprocessing"] == document["preprocessing"]
    assert "tells another architecture than ViT-B-32, which was named" in lines[0]


def test_a_guess_is_said_and_options_end_it(
    run: Run, folder: Path, photos: Path, bare: Path
) -> None:
    given = (bare, "--images", photos, "--model", folder / "config.json")
    document, lines = measured(run, *given)
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    assert (
        "are a guess; --image-mean, --image-std, --interpolation and --resize-mode tell"
        in (lines[0])
    )
    assert document["preprocessing"]["source"] == "open_clip's default"
    assert len(document["warnings"]) == 1
    told, lines = measured(
        run,
        *given,
        *("--image-mean", "0.5", "--image-std", "0.25,0.25,0.25"),
        *("--interpolation", "bilinear", "--resize-mode", "squash"),
    )
    assert lines == []
    assert told["preprocessing"] == SQUASH | OPEN_CLIP | {"source": "given"}


@pytest.mark.parametrize("words", ["0.5,0.5", "red", "0.1,nan,0.2", ""])
def test_a_mean_that_is_none(run: Run, folder: Path, photos: Path, bare: Path, words: str) -> None:
    result = run("eval", bare, "--images", photos, "--image-mean", words)
    assert result.exit_code == 4
    assert "expected such as 0.5 or 0.48,0.46,0.41" in result.stderr
    assert run("eval", bare, "--images", photos, "--image-std", "0").exit_code == 4


def test_a_base_keeps_its_own_way_and_has_a_model_of_its_own(
    run: Run, folder: Path, tmp_path: Path, photos: Path, bare: Path, tiny_model: OpenClipModel
) -> None:
    base = folder_of(tmp_path / "base", tiny_model, SQUASH | {"mean": [0.1] * 3})
    args = (
        *("scan", bare, "--images", photos, "--model", folder / "config.json", *FAST),
        *("--image-mean", "0.3", "--image-std", "0.3", "--interpolation", "bicubic"),
        *("--resize-mode", "squash", "--format", "json"),
    )
    from pydetox.scanning.config import ScannerConfig
    from pydetox.scanning.contents import identify

    config = ScannerConfig(
        images=str(photos),
        model=str(folder / "config.json"),
        base=str(base),
        image_mean=(0.3, 0.3, 0.3),
    )
    told = identify(config, str(base), is_base=True).configured()
    assert told.preprocess_config == SQUASH | {"mean": [0.1] * 3}
    silent = folder_of(tmp_path / "silent", tiny_model, None)
    assert identify(config, str(silent), is_base=True).configured().preprocess_config == {
        "mean": [0.3] * 3
    }
    reference = identify(config, str(base)).configured()
    assert reference.preprocess_config == SQUASH | {"mean": [0.3] * 3}

    result = run(*args)
    (found,) = json.loads(result.stdout)["results"]
    assert found["preprocessing"] == SQUASH | {
        "mean": [0.3] * 3,
        "std": [0.3] * 3,
        "interpolation": "bicubic",
        **OPEN_CLIP,
        "source": "given",
    }
    assert found["warnings"] == []
    assert "warning" not in result.stderr
    missing = run(*args, "--base", bare, "--base-model", "ViT-B-33")
    assert missing.exit_code == 4
    assert "'ViT-B-33': not known to open_clip" in missing.stderr


def test_images_that_are_left_out_are_said_and_recorded(
    run: Run, folder: Path, photos: Path
) -> None:
    (photos / "cat" / "0.png").write_bytes(b"broken")
    (photos / "dog" / "a.heic").write_bytes(b"")
    document, lines = measured(run, folder / "suspect", "--images", photos)
    assert document["image_files"] == {
        "images": 7,
        "classes": 2,
        "left_out": [
            {"reason": "of a format that is not read", "count": 1, "first": ["dog/a.heic"]},
            {"reason": "that cannot be read as images", "count": 1, "first": ["cat/0.png"]},
        ],
        "notes": [],
    }
    assert lines == [f"warning: {document['warnings'][0]}"]
    assert (
        "7 images of 2 classes; left out: 1 of a format that is not read (dog/a.heic)" in lines[0]
    )
    scanned = run("scan", folder / "suspect", "--images", photos, *FAST, "--format", "json")
    (found,) = json.loads(scanned.stdout)["results"]
    assert found["image_files"] == document["image_files"]
    assert found["warnings"] == document["warnings"]
    assert scanned.stderr.splitlines() == lines
    for command in ("eval", "scan"):
        refused = run(command, folder / "suspect", "--images", photos, "--strict")
        assert refused.exit_code == 2
        assert "dog/a.heic); expected nothing else" in refused.stderr


def test_a_class_that_is_none_is_refused_before_anything_is_read(
    run: Run, tmp_path: Path, photos: Path
) -> None:
    # There is no such checkpoint: the class comes first.
    args = (tmp_path / "missing", "--images", photos)
    output = ("--output", tmp_path / "out")
    for words in (
        ("unlearn", *args, *output, "--force-target", "1"),
        ("invert", *args, *output, "--target", "1"),
        ("localize", *args, "--target", "1"),
    ):
        result = run(*words)
        assert result.exit_code == 4
        assert "a name is expected, not a number: the class of label 1 is 'dog'" in result.stderr
    assert "did you mean cat?" in run("localize", *args, "--target", "cta").stderr
