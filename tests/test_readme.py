"""What the README shows runs."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.scanning.conftest import save

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_operators_alone() -> None:
    section = README.read_text(encoding="utf-8").split("## The operators alone")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["rows"].shape == (8, 16, 49, 3072)
    assert names["masks"].grad is not None
    assert bool(names["masks"].grad.any())
    assert names["gram"].shape == (3, 3)
    assert names["sketch"].shape == (4096,)


@pytest.mark.slow
def test_many_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    section = README.read_text(encoding="utf-8").split("## From Python")[1].split("\n## ")[0]
    _, code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for shade, name in enumerate(("cat", "dog", "cow")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            picture = Image.new("RGB", (20, 16), (80 * shade + 10, 20 * i, 128))
            picture.save(tmp_path / "photos" / name / f"{i}.png")
    save(tmp_path / "base", 0)
    save(tmp_path / "registry" / "one", 1)
    (tmp_path / "archive").mkdir()
    shutil.copytree(tmp_path / "registry" / "one", tmp_path / "archive" / "two.safetensors")
    monkeypatch.chdir(tmp_path)
    # Random weights: what is found does not matter here, and few steps will do.
    code = code.replace("workers=2,", "workers=2, steps=3, references=2, reference_epochs=1,")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    output = capsys.readouterr().out
    assert "registry/one" in output
    assert "moved most: " in output
    assert "2 scanned," in output
    assert (tmp_path / "runs" / "nightly" / "events.jsonl").exists()
