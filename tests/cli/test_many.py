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

from .conftest import FAST, Run


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
    given = (logs, *images, *model, *FAST, "--force-target", "dog", "--warps", "0")
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
    with pytest.raises(UsageError, match="is not YAML"):
        read_config_file(path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(UsageError, match="expected one YAML object"):
        read_config_file(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UsageError, match="is not YAML"):
        read_config_file(path)


def test_sizes_are_explained_where_they_are_printed(
    run: Run, folder: Path, images: tuple[str, str], tmp_path: Path
) -> None:
    for args in (("scan",), ("invert", "--output", tmp_path / "o")):
        text = run(args[0], folder / "suspect", *images, *FAST, *args[1:]).stdout
        assert "share of the image that it covers" in " ".join(text.split())
