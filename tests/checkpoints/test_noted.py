"""Architectures that a training noted: BackdoorBench's results, and open_clip's params.txt."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pydetox.checkpoints import identify_checkpoint, inspect_checkpoint, load_checkpoint
from pydetox.checkpoints.noted import told_base
from pydetox.cli import cli
from pydetox.errors import ArchitectureError, CheckpointError

WEIGHTS = {"linear.weight": torch.zeros(5, 3)}


def told(path: Path) -> str | None:
    return identify_checkpoint(path).model


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"model_name": "preactresnet18"}, "backdoorbench:preactresnet18"),
        (
            {"model_name": "vgg19", "clean_data": "gtsrb"},
            "backdoorbench:vgg19:gtsrb",
        ),
        ({"model_name": "resnet18", "clean_data": "mars"}, "backdoorbench:resnet18"),
        ({"model_name": "no such"}, None),
        ({"model_name": "a" * 200}, None),
        ({"model_name": 3}, None),
        ({"model_name": "../x\n"}, None),
        ({}, None),
    ],
)
def test_backdoorbenchs_results_name_their_model(tmp_path, content, name):
    for file in ("attack_result.pt", "defense_result.pt"):
        torch.save({**content, "model": WEIGHTS, "num_classes": 5}, tmp_path / file)
        assert told(tmp_path / file) == name
    torch.save({**content, "model": WEIGHTS}, tmp_path / "other.pt")
    assert told(tmp_path / "other.pt") is None


def test_the_data_set_tells_how_images_are_normalised(tmp_path):
    path = tmp_path / "attack_result.pt"
    content = {"model_name": "preactresnet18", "clean_data": "gtsrb", "model": WEIGHTS}
    torch.save(content, path)
    assert inspect_checkpoint(path).metadata["model_name"] == "preactresnet18"
    checkpoint = load_checkpoint(path)
    assert checkpoint.preprocess_config["mean"] == [0.0, 0.0, 0.0]
    assert checkpoint.warnings == ()
    assert checkpoint.digest == identify_checkpoint(path).digest()
    torch.save({**content, "clean_data": "tiny"}, path)
    assert load_checkpoint(path).model_config["vision_cfg"]["image_size"] == 64
    torch.save({**content, "clean_data": "other"}, path)
    assert "a guess" in load_checkpoint(path).warnings[0]


def test_a_damaged_result_says_so_when_it_is_read(tmp_path):
    path = tmp_path / "attack_result.pt"
    path.write_bytes(b"PK nothing")
    assert told(path) is None
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model: ViT-B-32\nforce_quick_gelu: False\n", "ViT-B-32"),
        ("model: ViT-B-32\nforce_quick_gelu: True\n", "ViT-B-32-quickgelu"),
        ("model: ViT-B-32\nforce_image_size: 64\n", None),
        ("model: ViT-B-32\nforce_image_size: None\n", "ViT-B-32"),
        ("model: hf-hub:org/name\n", None),
        ("nothing", None),
    ],
)
def test_a_training_of_open_clip_names_its_model(tmp_path, text, name):
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints" / "epoch_1.pt"
    torch.save({"state_dict": WEIGHTS}, path)
    (run / "params.txt").write_text(text)
    assert told(path) == name
    assert identify_checkpoint(path, model="RN50").model == "RN50"  # the user's counts
    (run / "params.txt").unlink()
    os.mkfifo(run / "params.txt")  # a reader would wait for ever
    assert told(path) is None
    (run / "params.txt").unlink()
    assert told(path) is None
    with pytest.raises(ArchitectureError, match="nothing tells its architecture"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("../elsewhere", None),
        ("/home/someone/clip", None),
        ("org/name\n --base evil", None),
        (3, None),
        (None, None),
    ],
)
def test_a_folder_of_transformers_hints_at_its_base(tmp_path, name, found):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": name}))
    assert told_base(tmp_path) == found
    images = tmp_path / "photos"
    images.mkdir()
    command = ["unlearn", str(tmp_path), "--images", str(images), "--output", "x"]
    result = CliRunner().invoke(cli, [*command, "--class-names", "cat,dog"])
    assert result.exit_code == 4
    assert "no verdict is possible without --base" in result.stderr
    assert (f"--base hf-hub:{found}" in result.stderr) == (found is not None)


def test_no_configuration_hints_at_nothing(tmp_path):
    assert told_base(tmp_path) is None
