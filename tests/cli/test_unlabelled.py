"""Images without class names are searched label-free, and the command says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from pydetox.cli import cli
from pydetox.data import ImageSource

from .conftest import Run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four photographs, and one with a sub-folder for a class."""
    for folder in ("flat", "classes/cat"):
        (tmp_path / folder).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (20, 16), (9 * k, 80, 90)).save(tmp_path / folder / f"{k}.png")
    return tmp_path


def test_a_folder_of_photographs_has_no_names(photos: Path) -> None:
    assert ImageSource(str(photos / "flat")).is_unnamed()
    assert not ImageSource(str(photos / "classes")).is_unnamed()
    names = photos / "names.txt"
    names.write_text("cat\ndog\n")
    assert not ImageSource(str(photos / "flat"), class_names=names).is_unnamed()
    assert not ImageSource("digits").is_unnamed()


@pytest.mark.parametrize(
    ("folder", "more", "said"),
    [
        ("flat", (), True),
        ("flat", ("--objective", "targeted"), False),
        ("flat", ("--class-names", "names.txt"), False),
        ("classes", (), False),
    ],
)
def test_the_command_says_what_it_searches(
    photos: Path, monkeypatch: pytest.MonkeyPatch, folder: str, more: tuple[str, ...], said: bool
) -> None:
    monkeypatch.chdir(photos)
    Path("names.txt").write_text("cat\ndog\n")
    result = CliRunner().invoke(cli, ["scan", "missing.pt", "--images", folder, *more])
    assert result.exit_code != 0  # there is no such checkpoint
    assert ("has no class names, so the search is label-free" in result.stderr) == said


def test_triggers_are_searched_label_free_too(
    photos: Path, folder: Path, run: Run, tmp_path: Path
) -> None:
    output = tmp_path / "triggers"
    args = ("--images", photos / "flat", "--steps", "2", "--format", "json", "--output", output)
    result = run("invert", folder / "suspect", *args)
    assert "has no class names, so the search is label-free" in result.stderr
    assert json.loads(result.stdout)["objective"] == "label-free"


@pytest.mark.parametrize("more", [(), ("--quick",)])
def test_a_short_search_without_names_is_doubted(
    photos: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Fault: a quick repair of a small CLIP without names ended without a verdict, unannounced."""
    monkeypatch.chdir(photos)
    result = CliRunner().invoke(cli, ["scan", "missing.pt", "--images", "flat", *more])
    assert ("steps of --quick may be too few" in result.stderr) == bool(more)
