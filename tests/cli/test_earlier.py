"""What a command may replace: its own earlier results, never what it reads or another file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click import Option

from pydetox.checkpoints import save_weights
from pydetox.cli import cli
from pydetox.cli.outputs import READ
from pydetox.errors import OutputError
from pydetox.inversion.trigger_file import TriggerFile
from pydetox.scanning.store import RunStore

from .conftest import FAST, Run, error_line
from .test_bad_input import snapshot

TABLES = ("text", "json", "jsonl", "csv")
RUNS = (*TABLES, "sarif", "html")


@pytest.fixture
def given(folder: Path, tmp_path: Path) -> Path:
    """A copy of what the user has, with every kind of file that a command reads."""
    root = tmp_path / "given"
    shutil.copytree(folder, root)
    (root / "names.txt").write_text("cat\ndog\ncow\n")
    (root / "prompts.txt").write_text("a {c}\n")
    (root / "scan.yaml").write_text("steps: 3\n")
    (root / "targets.txt").write_text(f"{root / 'suspect'}\n")
    (root / "words.jsonl").write_text('{"text": "a", "label": "b"}\n')
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:9, 4:9] = 1
    file = TriggerFile(mask, torch.ones(1, 3, 16, 16), ("dog",), mask.double().mean(dim=(1, 2)))
    (root / "trigger.safetensors").write_bytes(file.to_bytes())
    return root


def refused(run: Run, root: Path, *args: object) -> str:
    before = snapshot(root)
    result = run(*args)
    assert result.exit_code in (2, 4)
    assert result.stdout == ""
    assert snapshot(root) == before
    return error_line(result)


def too_late(*_: object, **__: object) -> None:
    raise AssertionError("work was done")


def test_the_parameters_that_name_files_are_known() -> None:
    shown = ("FILE", "FOLDER", "REF", "SPEC", "TARGET", "JSON", "DIR", "RUN", "IN", "BASE")
    written = {"output", "report", "markdown", "save_calibration"}
    for name in cli.list_commands(None):  # type: ignore[arg-type]
        command = cli.get_command(None, name)
        assert command is not None
        for one in command.params:
            metavar = one.metavar or str(one.name).upper()
            if isinstance(one, Option) and one.is_flag:
                continue
            if any(word in metavar.replace("|", " ").replace(".", " ").split() for word in shown):
                assert one.name in {*READ, *written, "config"}, (name, one.name)


@pytest.mark.parametrize("option", ["--output", "--report", "--save-calibration"])
@pytest.mark.parametrize(
    ("reads", "name"),
    [
        ("TARGET", "suspect/open_clip_model.safetensors"),
        ("TARGET", "targets.txt"),
        ("--images", "images.npz"),
        ("--class-names", "names.txt"),
        ("--templates", "prompts.txt"),
        ("--model", "config.json"),
        ("--known-vector", "trigger.safetensors"),
        ("--config", "scan.yaml"),
        ("--before", "base/open_clip_model.safetensors"),
        ("--base", "base/open_clip_model.safetensors"),
        ("--texts", "words.jsonl"),
    ],
)
def test_a_scan_replaces_nothing_that_it_reads(
    run: Run, given: Path, option: str, reads: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydetox.scanning.Scanner", too_late)
    target = given / name if reads == "TARGET" else given / "suspect"
    args = ["scan", target, "--images", given / "images.npz"]
    if reads not in ("TARGET", "--images"):
        args += [reads, given / name]
    if reads != "--base":
        args += ["--base", given / "base"]
    (given / "link").symlink_to(given / name)
    for written in (given / name, given / "suspect" / ".." / name, given / "link"):
        line = refused(run, given, *args, option, written)
        assert f"{option} and {reads}" in line
        assert "are the same file" in line


def test_a_saved_calibration_is_read_or_written(
    run: Run, given: Path, images: tuple, says_clean: Path, tmp_path: Path
) -> None:
    common = ("scan", given / "suspect", *images, *FAST)
    for option in ("--output", "--report"):
        line = refused(run, tmp_path, *common, "--calibration", says_clean, option, says_clean)
        assert f"{option} and --calibration are the same file" in line
        line = refused(run, tmp_path, *common, "--base", given / "base", option, says_clean)
        assert "is not a result of pydetox" in line
    document = tmp_path / "inspected.json"
    assert run("inspect", given / "base", "--format", "json", "--output", document).exit_code == 0
    line = refused(run, tmp_path, *common, "--base", given / "base", "--save-calibration", document)
    assert "is not a calibration of pydetox" in line


@pytest.mark.parametrize(
    "name",
    [
        "suspect/open_clip_model.safetensors",
        "suspect/open_clip_config.json",
        "images.npz",
        "trigger.safetensors",
        "names.txt",
        "scan.yaml",
        "words.jsonl",
        "mine.html",
        "mine.csv",
        "empty.npz",
        "mine.json",
    ],
)
def test_no_command_replaces_another_file(run: Run, given: Path, name: str) -> None:
    (given / "mine.html").write_text("<!doctype html>\n<html><title>mine</title></html>")
    (given / "mine.csv").write_text("filepath,label\na.png,cat\n")
    (given / "empty.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    (given / "mine.json").write_text('{"schema": "mine/1"}')
    images, path = ("--images", given / "images.npz"), given / name
    known = (*images, "--trigger", given / "trigger.safetensors")
    for command in (
        ("scan", given / "suspect", *images, "--output", path),
        ("scan", given / "suspect", *images, "--dry-run", "--output", path),
        ("scan", given / "suspect", *images, "--report", path),
        ("scan", given / "suspect", *images, "--base", given / "base", "--save-calibration", path),
        ("eval", given / "suspect", *images, "--output", path),
        ("inspect", given / "suspect", "--output", path),
        ("datasets", "--output", path),
        ("models", "ViT-B-32", "--markdown", path),
        ("localize", given / "suspect", *known, "--report", path),
        ("unlearn", given / "suspect", *known, "--output", given / "out", "--report", path),
    ):
        line = refused(run, given, *command)
        assert str(path) in line
        assert "so it is not replaced" in line or "are the same file" in line


def test_a_text_model_keeps_its_texts(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.text import tiny

    tiny.bert(tmp_path / "model")
    texts = tmp_path / "texts.csv"
    rows = [f"{text},{name}" for text, name in tiny.topical_texts(24, seed=9)]
    texts.write_text("\n".join(["text,label", *rows]))
    common = (tmp_path / "model", "--texts", texts)
    for command in (
        ("eval", *common, "--output", texts),
        ("scan", *common, "--output", texts),
        ("scan", *common, "--report", texts),
        ("unlearn", *common, "--base", tmp_path / "model", "--output", tmp_path / "o", "--report",
         texts),
    ):  # fmt: skip
        assert "and --texts are the same file" in refused(run, tmp_path, *command)
    before = ("unlearn", *common, "--base", tmp_path / "model", "--overwrite")
    line = refused(run, tmp_path, *before, "--output", tmp_path / "model")
    assert "would replace CHECKPOINT, which the command reads" in line


@pytest.mark.parametrize("format_", RUNS)
def test_the_same_command_again(
    run: Run, given: Path, images: tuple, says_clean: Path, tmp_path: Path, format_: str
) -> None:
    scan = ("scan", given / "suspect", *images, *FAST, "--calibration", says_clean)
    commands = [
        (*scan, "--run", tmp_path / "run", "--report", given / "report.html"),
        ("report", tmp_path / "run"),
    ]
    if format_ in TABLES:
        commands += [
            ("eval", given / "suspect", given / "base", *images),
            ("inspect", given / "suspect", given / "base", "--summary"),
            ("datasets",),
            (*scan, "--dry-run"),
        ]
    if format_ in ("text", "json"):
        commands += [("compare", tmp_path / "run", tmp_path / "run")]
    for number, command in enumerate(commands):
        # Beside what is read, where a command might also lie.
        output = given / f"{number}.out"
        for _ in range(2):
            result = run(*command, "--format", format_, "--output", output)
            assert "replaced" not in result.stderr
        first = output.stat().st_ino
        run(*command, "--format", format_, "--output", output)
        assert output.stat().st_ino != first


def test_other_results_of_the_same_command(
    run: Run, given: Path, images: tuple, tmp_path: Path, models: tuple
) -> None:
    known = (*images, "--trigger", given / "trigger.safetensors", "--alpha", "0.5")
    saved = tmp_path / "saved.json"
    for command in (
        ("localize", given / "suspect", *known, "--report", tmp_path / "localized.html"),
        ("models", "ViT-B-32", "--markdown", tmp_path / "models.md"),
        ("scan", given / "suspect", *images, *FAST, *models, "--save-calibration", saved),
    ):
        for _ in range(2):
            result = run(*command)
            assert "error: " not in result.stderr
        assert Path(command[-1]).stat().st_size


def test_an_empty_file_is_filled(run: Run, given: Path, tmp_path: Path) -> None:
    output = tmp_path / "made"
    output.touch()
    assert run("inspect", given / "suspect", "--output", output).exit_code == 0
    assert "tensors" in output.read_text()


def test_no_folder_replaces_what_is_read(run: Run, given: Path, tmp_path: Path) -> None:
    images = ("--images", given / "images.npz")
    target = ("--trigger", given / "trigger.safetensors", "--overwrite")
    for checkpoint in (given / "suspect", given / "suspect" / "open_clip_model.safetensors"):
        line = refused(
            run, given, "unlearn", checkpoint, *images, *target, "--output", given / "suspect"
        )
        assert "--output" in line
        assert "would replace CHECKPOINT, which the command reads" in line
    line = refused(
        run, given, "unlearn", given / "suspect", *images, *target,
        "--base", given / "base", "--output", given / "base",
    )  # fmt: skip
    assert "would replace --base, which the command reads" in line
    pictures = tmp_path / "pictures"
    assert run(
        "invert", given / "suspect", *images, *FAST, "--target", "dog", "--output", pictures
    ).exit_code in (0, 2)
    (pictures / "triggers.safetensors").unlink()
    line = refused(
        run, tmp_path, "invert", given / "suspect", "--images", pictures, *FAST,
        "--class-names", given / "names.txt", "--output", pictures, "--overwrite",
    )  # fmt: skip
    assert "would replace --images, which the command reads" in line


def test_convert_keeps_what_it_reads(run: Run, given: Path) -> None:
    weights = given / "suspect" / "open_clip_model.safetensors"
    line = refused(run, given, "convert", weights, weights, "--overwrite")
    assert f"OUT {weights} would replace IN" in line
    line = refused(run, given, "convert", given / "suspect", weights, "--overwrite")
    assert "is read here, so it is not replaced" in line
    shards = given / "shards"
    shards.mkdir()
    save_weights(shards / "a.safetensors", {"x": torch.zeros(2)})
    save_weights(shards / "b.safetensors", {"y": torch.zeros(2)})
    index = shards / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    line = refused(run, given, "convert", index, shards / "b.safetensors", "--overwrite")
    assert "is read here, so it is not replaced" in line
    assert run("convert", index, shards / "c.safetensors").exit_code == 0


@pytest.mark.parametrize("name", ["config.json", "events.jsonl", "index.sqlite", "triggers"])
def test_a_run_folder_is_one_or_new(run: Run, given: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    if name == "triggers":
        (mine / name).mkdir()
    else:
        (mine / name).write_text('{"event": "mine"}\n')
    args = ("--images", given / "images.npz", *FAST, "--no-inversion", "--run", mine)
    line = refused(run, tmp_path, "scan", given / "suspect", *args)
    assert f"{mine}: holds {name!r} of somebody else" in line
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for _ in range(2):
        with RunStore(other):
            pass
    with pytest.raises(OutputError, match="of somebody else"), RunStore(mine):
        pass


def test_demo_and_bench_replace_their_own_folder(run: Run, tmp_path: Path) -> None:
    from pydetox.research.bench import Plan
    from pydetox.research.bench.outputs import begin_outputs
    from pydetox.research.demo import begin_folder

    for name in ("summary.json", "report.html", "seed.txt"):
        mine = tmp_path / name.partition(".")[0]
        mine.mkdir()
        (mine / name).write_text("{}")
        line = refused(run, tmp_path, "demo", "--output", mine)
        assert f"holds {name!r} of somebody else" in line
    line = refused(run, tmp_path, "bench", "--output", tmp_path / "report")
    assert "holds 'report.html' of somebody else" in line
    for _ in range(2):
        begin_folder(tmp_path / "demo", 3)
        (tmp_path / "demo" / "summary.json").write_text("{}")
        begin_outputs(tmp_path / "bench", Plan())
        (tmp_path / "bench" / "summary.json").write_text("{}")
