"""Commands over several checkpoints, tables, `logs/` of a training, and YAML configurations."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from pydetox.checkpoints import load_checkpoint, save_weights
from pydetox.cli import unlearn
from pydetox.errors import UsageError
from pydetox.scanning.config import read_config_file

from .conftest import FAST, Run, error_line


@pytest.fixture
def logs(tmp_path: Path, folder: Path) -> Path:
    """What open_clip's training leaves: logs/NAME/checkpoints/epoch_K.pt, beside other things."""
    inner = tmp_path / "logs" / "run" / "checkpoints"
    inner.mkdir(parents=True)
    for epoch, name in ((2, "base"), (10, "suspect")):
        save_weights(inner / f"epoch_{epoch}.pt", load_checkpoint(folder / name).state_dict)
    (tmp_path / "logs" / "run" / "params.txt").write_text("model: x")
    return tmp_path / "logs"


def test_eval_of_several_in_every_format(
    run: Run, folder: Path, images: tuple[str, str], tmp_path: Path
) -> None:
    names = [str(folder / "base"), str(folder / "suspect")]
    result = run("eval", *names, *images, "--format", "json")
    assert result.exit_code == 0, result.stderr
    whole = json.loads(result.stdout)
    assert whole["schema"] == "pydetox.evals/1"
    alone = [json.loads(run("eval", one, *images, "--format", "json").stdout) for one in names]
    for one, other in zip(whole["checkpoints"], alone, strict=True):
        assert one["name"].endswith(other.pop("name"))
        assert {key: one[key] for key in other} == other
    lines = run("eval", *names, *images, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == whole["checkpoints"]
    output = tmp_path / "table.csv"
    assert run("eval", *names, *images, "--format", "csv", "--output", output).stdout == ""
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [row["sha256"] for row in rows] == [one["sha256"] for one in alone]
    assert [float(row["clean_accuracy"]) for row in rows] == [x["clean_accuracy"] for x in alone]
    text = run("eval", *names, *images).stdout
    assert all(name in text.replace("\n", "") for name in ("base", "suspect"))


def test_one_that_cannot_be_read_does_not_keep_others_from_it(
    run: Run, folder: Path, images: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    args = (tmp_path / "bad.pt", folder / "suspect", *images, "--format", "csv")
    result = run("eval", *args)
    assert result.exit_code == 2
    assert "bad.pt" in result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [bool(row["error"]) for row in rows] == [True, False]
    assert rows[0]["clean_accuracy"] == ""


def test_the_logs_of_a_training(
    run: Run,
    folder: Path,
    images: tuple[str, str],
    logs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ("--model", str(folder / "config.json"))
    for name in (logs, logs / "run", logs / "run" / "checkpoints"):
        result = run("eval", name, *images, *model, "--format", "jsonl")
        assert len(result.stdout.splitlines()) == 2, result.stderr
    args = (logs, *images, *model, *FAST, "--output", tmp_path / "out", "--format", "json")
    whole = json.loads(run("invert", *args).stdout)
    assert whole["schema"] == "pydetox.inverts/1"
    paths = [Path(one["path"]) for one in whole["checkpoints"]]
    assert all(path.is_file() and path.parent.parent == tmp_path / "out" for path in paths)
    assert run("invert", *args).exit_code != 0  # it is there already
    rows = run("invert", *args[:-2], "--overwrite", "--format", "csv").stdout.splitlines()
    assert len(rows) == 1 + 2 * 3
    # One that takes a single checkpoint takes the last epoch, the tenth and not the second.
    monkeypatch.setattr(unlearn, "_SHORT", 0.0)
    given = (logs, *images, *model, *FAST, "--force-target", "dog", "--warps", "0", "--waves", "0")
    result = run("unlearn", *given, "--vector-steps", "1", "--output", tmp_path / "clean")
    assert "of 2 checkpoints in it" in result.stderr
    assert "epoch_10.pt is taken" in result.stderr
    assert "until the verdict" in result.stderr
    shutil.copytree(logs / "run", logs / "other")
    result = run("unlearn", *given, "--output", tmp_path / "clean", "--overwrite")
    assert result.exit_code == 4
    assert "holds 4 checkpoints" in result.stderr


def test_a_configuration_in_yaml(
    run: Run, folder: Path, images: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "scan.yaml"
    path.write_text(f"steps: 3\nbatch-size: 1\nimages: {images[1]}\nformat: json\n")
    result = run("scan", folder / "suspect", "--config", path)
    assert json.loads(result.stdout)["results"][0]["class_steps"] == [3, 3, 3]
    path.write_text("steps: [1, 2")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        read_config_file(path)
    path.write_text("steps: 3\nbatch-size: 1\nsteps: 4\n")
    with pytest.raises(UsageError, match=r"YAML \(line 3, column 1: the key 'steps'"):
        read_config_file(path)
    path.write_text("base: &b {steps: 1}\nnext:\n  <<: *b\n  steps: 2\n")
    assert read_config_file(path) == {"base": {"steps": 1}, "next": {"steps": 2}}
    (tmp_path / "scan.json").write_text('{"steps": 3, "steps": 4}')
    with pytest.raises(UsageError, match=r"as JSON \(the key 'steps' is there twice\)"):
        read_config_file(tmp_path / "scan.json")
    path.write_text("batch-size: 1\nbatch_size: 2\n")
    result = run("scan", folder / "suspect", *images, "--config", path)
    assert result.exit_code == 4
    assert "'batch-size' and 'batch_size' are the same option" in error_line(result)
    for text, reason in (
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: [1\nb: 2", "line 2, column 2: expected ',' or ']', but got ':'"),
        ("a: \x01", "unacceptable character #x0001: special characters are not allowed"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError) as caught:
            read_config_file(path)
        assert str(caught.value) == f"{path}: cannot be read as YAML ({reason})"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(UsageError, match="expected one YAML object"):
        read_config_file(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        read_config_file(path)


def test_texts_or_images_that_nothing_needs_are_mentioned(
    run: Run, folder: Path, images: tuple[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from tests.text import tiny

    tiny.bert(tmp_path / "text")
    texts = tmp_path / "texts.csv"
    rows = [f"{text},{name}" for text, name in tiny.topical_texts(24, seed=9)]
    texts.write_text("\n".join(["text,label", *rows]))
    both = (*images, "--texts", texts)
    unused = "warning: --texts is not used: it is for text models, and no target is one"
    fast = ("--steps", "1", "--batch-size", "1")
    for command in (
        ("eval", folder / "suspect", *both),
        ("eval", folder / "suspect", folder / "base", *both),
        ("scan", folder / "suspect", *both, *fast),
        ("invert", folder / "suspect", *both, *fast, "--output", tmp_path / "o"),
        ("unlearn", folder / "suspect", *both, *fast, "--output", tmp_path / "u"),
    ):
        assert unused in run(*command).stderr.splitlines()
    unused = "warning: --images is not used: it is for image models, and no target is one"
    result = run("eval", tmp_path / "text", *both)
    assert (result.exit_code, unused in result.stderr.splitlines()) == (0, True)
    result = run("eval", tmp_path / "text", folder / "suspect", *both)
    assert (result.exit_code, "is not used" in result.stderr) == (0, False)
    for option in (("--max-texts", 5), ("--place", "end"), ("--trigger-length", 2)):
        result = run("scan", folder / "suspect", *images, *option)
        assert result.exit_code == 4
        assert f"{option[0]} is for text models and needs --texts" in error_line(result)


def test_sizes_are_explained_where_they_are_printed(
    run: Run, folder: Path, images: tuple[str, str], tmp_path: Path
) -> None:
    for args in (("scan",), ("invert", "--output", tmp_path / "o")):
        text = run(args[0], folder / "suspect", *images, *FAST, *args[1:]).stdout
        assert "share of the image that it covers" in " ".join(text.split())


def test_files_beside_weights_are_not_mentioned_and_others_are_counted(
    run: Run, folder: Path, images: tuple[str, str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(12):
        (photos / f"{k:02}.png").touch()
    result = run("eval", folder / "base", photos, *images)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"warning: {photos}: holds no weights files, and is passed over",
        f"warning: 12 files are no weights by name, and passed over ({photos}/00.png, "
        f"{photos}/01.png, ...)",
    ]
    links = [tmp_path / "many" / f"{k:02}" for k in range(15)]
    links[0].parent.mkdir()
    for link in links:
        link.symlink_to(photos)
    lines = run("eval", folder / "base", links[0].parent, *images).stderr.splitlines()
    assert len(lines) == 11
    assert lines[-1].endswith("more are passed over")


def test_data_sets_and_lists_have_names(run: Run, tmp_path: Path) -> None:
    whole = json.loads(run("datasets", "--format", "json").stdout)["datasets"]
    by_name = {one["name"]: one for one in whole}
    assert by_name["digits"]["classes"] == 10
    assert by_name["imagenet"] == {
        "name": "imagenet",
        "kind": "class names",
        "classes": 1000,
        "source": "open_clip",
        "obstacle": None,
    }
    assert {"cifar10=FOLDER", "cifar10-test=FOLDER", "fashion-mnist"} <= by_name.keys()
    text = run("datasets").stdout
    assert all(name in text for name in by_name)
    some = [one for one in whole if one["name"].startswith("cifar10")]
    lines = run("datasets", "CIFAR10", "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == some
    output = tmp_path / "table.csv"
    run("datasets", "cifar10", "--format", "csv", "--output", output)
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["name"] for row in rows] == [one["name"] for one in some]
    assert run("datasets", "nothing").exit_code == 4


def test_architectures_are_found_however_they_are_written(run: Run) -> None:
    names = [
        json.loads(run("models", name, "--format", "json").stdout)
        for name in ("ViT-B-32", "vit-b-32", "ViT-B/32")
    ]
    assert [one["models"][0]["name"] for one in names] == ["ViT-B-32"] * 3


def test_an_evaluation_without_labels_says_what_is_missing(run: Run, folder: Path) -> None:
    from .conftest import write_images

    unlabelled = write_images(folder / "unlabelled.npz", 6, labels=None, class_names=None)
    result = run("eval", folder / "base", "--images", unlabelled)
    assert result.exit_code == 2
    assert "no labels; accuracy cannot be measured" in result.stderr
    assert "class_names" not in result.stderr
