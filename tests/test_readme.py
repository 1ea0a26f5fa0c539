"""What the README shows runs."""

import re
from pathlib import Path

import pytest
from PIL import Image

import pydetox
from pydetox.inversion import InversionConfig
from pydetox.training import TrainConfig
from tests.scanning.conftest import save

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_way_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for shade, name in enumerate(("cat", "dog", "cow")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            picture = Image.new("RGB", (20, 16), (80 * shade + 10, 20 * i, 128))
            picture.save(tmp_path / "photos" / name / f"{i}.png")
    save(tmp_path / "base", 0)
    save(tmp_path / "suspect", 1)
    monkeypatch.chdir(tmp_path)
    # The same lines, with small models of random weights and with few steps.
    for shown, small in (
        ("image_size=224", "image_size=16"),
        ('"suspect.safetensors", model="ViT-B-32"', '"suspect"'),
        ('"ViT-B-32,laion2b_s34b_b79k"', '"base"'),
        ("base=base,", "base=base, config=config, unlearning=unlearning,"),
    ):
        assert shown in code, shown
        code = code.replace(shown, small)
    config = pydetox.ScanConfig(
        inversion=InversionConfig(steps=5),
        references=2,
        reference_training=TrainConfig(epochs=1, learning_rate=1e-4),
    )
    unlearning = pydetox.UnlearnConfig(steps=2, passes=1, warps=0, waves=0)
    names: dict = {"config": config, "unlearning": unlearning}
    exec(compile(code, "README.md", "exec"), names)
    verdict, repaired = capsys.readouterr().out.split()
    assert verdict in ("clean", "suspicious", "backdoored", "inconclusive")
    assert repaired in ("True", "False")
    assert names["result"].before.class_names == ("cat", "cow", "dog")
