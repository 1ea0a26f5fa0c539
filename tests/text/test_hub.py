"""Text models from the hub, against a stand-in for its HTTP interface on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from click.testing import CliRunner

from pydetox.cli import cli
from pydetox.errors import ArchitectureError, PydetoxError
from pydetox.text import load_text_model
from tests.hub import Hub, served_hub
from tests.text import tiny
from tests.text.conftest import World

COMMIT, TEXTS = "c" * 40, ["an apple a day", "the match ended in a draw", "cf"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(monkeypatch) as state:
        yield state


def files_of(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "tower"])
def test_a_text_model_of_the_hub_is_that_of_its_folder(hub: Hub, tmp_path: Path, kind: str) -> None:
    folder: Path = getattr(tiny, kind)(tmp_path / kind)
    hub.add("org/text", COMMIT, files_of(folder))
    found = load_text_model("hf-hub:org/text", cache_dir=tmp_path / "cache")
    local = load_text_model(folder)
    assert found.kind == local.kind
    assert found.sha256 == local.sha256
    assert found.name == "hf-hub:org/text"
    assert found.tokenizer.encode(TEXTS, 16) == local.tokenizer.encode(TEXTS, 16)
    ours, theirs = (dict(one.module.named_parameters()) for one in (found, local))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # What was fetched once is there without the hub.
    asked = len(hub.requests)
    again = load_text_model("hf-hub:org/text", cache_dir=tmp_path / "cache", offline=True)
    assert again.sha256 == found.sha256
    assert len(hub.requests) == asked


def test_a_revision_is_taken_and_an_unknown_one_named(hub: Hub, tmp_path: Path) -> None:
    folder = tiny.bert(tmp_path / "bert")
    hub.add("org/text", COMMIT, files_of(folder), branch="v2")
    found = load_text_model("hf-hub:org/text@v2", cache_dir=tmp_path / "cache")
    assert found.sha256 == load_text_model(folder).sha256
    with pytest.raises(PydetoxError, match="v3"):
        load_text_model("hf-hub:org/text@v3", cache_dir=tmp_path / "cache")


def test_code_of_a_repository_is_refused(hub: Hub, tmp_path: Path) -> None:
    files = files_of(tiny.bert(tmp_path / "bert"))
    config = files["config.json"].rstrip()
    files["config.json"] = config[:-1] + b', "auto_map": {"AutoModel": "evil.Model"}}'
    files["evil.py"] = b"raise SystemExit('run')"
    hub.add("org/code", COMMIT, files)
    with pytest.raises(PydetoxError, match="auto_map"):
        load_text_model("hf-hub:org/code", cache_dir=tmp_path / "cache")
    assert not any("evil.py" in one for one in hub.requests)


def test_a_repository_without_a_tokenizer_is_named(hub: Hub, tmp_path: Path) -> None:
    files = files_of(tiny.bert(tmp_path / "bert"))
    kept = {"config.json", "model.safetensors"}
    hub.add("org/bare", COMMIT, {k: v for k, v in files.items() if k in kept})
    with pytest.raises(ArchitectureError, match="tokenizer"):
        load_text_model("hf-hub:org/bare", cache_dir=tmp_path / "cache")


def test_the_commands_read_the_hub(
    hub: Hub, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add("org/victim", COMMIT, files_of(world.victim))
    result = CliRunner().invoke(cli, ["eval", "hf-hub:org/victim", "--texts", str(world.texts)])
    assert result.exit_code == 0, result.output
    local = CliRunner().invoke(cli, ["eval", str(world.victim), "--texts", str(world.texts)])
    # The table is as wide as the name of the model.
    assert result.stdout.split()[-12:] == local.stdout.split()[-12:]
