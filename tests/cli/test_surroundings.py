"""What a scan does when its surroundings fail: each tried once, with its message and exit code."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.models import OpenClipModel
from pydetox.scanning.store import RunStore

from .conftest import FAST, FAST_REFERENCES, TINY, Run, error_line


@pytest.fixture
def args(folder: Path, images: tuple, says_clean: Path, tmp_path: Path) -> tuple:
    """A scan of one checkpoint with a run folder, without targets."""
    given = ("--calibration", says_clean, "--engine", "inline", "--threads", "1")
    return (*images, *FAST, *given, "--run", tmp_path / "run", "--format", "json")


def resumed(result) -> list[bool]:
    return [one["resumed"] for one in json.loads(result.stdout)["results"]]


def test_two_scans_of_one_run_folder(run: Run, folder: Path, args: tuple, tmp_path: Path) -> None:
    with RunStore(tmp_path / "run"):
        result = run("scan", folder / "base", *args)
    assert result.exit_code == 4
    assert "another scan is at work in this run" in error_line(result)
    assert run("scan", folder / "base", *args).exit_code == 0


def test_a_drive_without_locks(
    run: Run, folder: Path, args: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    result = run("scan", folder / "base", *args)
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert "warning: " in result.stderr
    assert "cannot lock files (No locks available)" in result.stderr


def test_a_folder_that_cannot_be_written(run: Run, folder: Path, args: tuple) -> None:
    result = run("scan", folder / "base", *args[:-4], "--run", "/proc/run")
    assert result.exit_code == 2
    assert "/proc/run: cannot be written" in error_line(result)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process be larger than 2 KiB.

    It must end within the test: the limit holds for pytest's own output as well.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_and_the_run_goes_on_later(
    run: Run, folder: Path, args: tuple, tmp_path: Path
) -> None:
    with full_disk():
        result = run("scan", folder / "base", folder / "suspect", *args)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[-1].startswith(f"error: {tmp_path / 'run'}")
    assert "cannot be written" in lines[-1]
    assert all(line.startswith("warning: ") for line in lines[:-1])
    result = run("scan", folder / "base", folder / "suspect", *args)
    assert result.exit_code == 0
    assert result.stderr == ""


def test_other_results_on_a_full_disk_are_not_half_written(
    run: Run, folder: Path, images: tuple, says_clean: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    given = (*images, *FAST, "--calibration", says_clean, "--engine", "inline")
    commands = {
        "weights.safetensors": ("convert", folder / "base", made / "weights.safetensors"),
        "report.html": ("scan", folder / "base", *given, "--report", made / "report.html"),
        "scan.json": (
            *("scan", folder / "base", *given),
            *("--format", "json", "--output", made / "scan.json"),
        ),
    }
    for name, command in commands.items():
        with full_disk():
            result = run(*command)
        assert result.exit_code == 2
        assert f"{made / name}: cannot be written: " in error_line(result)
        assert list(made.iterdir()) == []
        assert run(*command).exit_code == 0
        (made / name).unlink()


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    from pydetox.errors import OutputError

    with full_disk(), RunStore(tmp_path) as store:
        store.event("small")
        with pytest.raises(OutputError, match=r"events\.jsonl: cannot be written"):
            store.event("large", text="x" * 10_000)
        store.event("small")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["small", "small"]


def test_a_clock_that_goes_backwards(
    run: Run, folder: Path, args: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    first = run("scan", folder / "base", *args)
    assert (first.exit_code, resumed(first)) == (0, [False])
    second = run("scan", folder / "base", *args)
    assert (second.exit_code, resumed(second)) == (0, [True])


def test_somebody_who_reads_the_index(
    run: Run, folder: Path, args: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunStore.index_record
    readers = []

    def index_record(self: RunStore, record: dict) -> None:
        if not readers:  # begins to read once the table is there, and does not end
            reader = sqlite3.connect(tmp_path / "run" / "index.sqlite", isolation_level=None)
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM records").fetchall()
            readers.append(reader)
        real(self, record)

    monkeypatch.setattr(RunStore, "index_record", index_record)
    began = time.monotonic()
    result = run("scan", folder / "base", folder / "suspect", *args)
    assert time.monotonic() - began < 30
    assert result.exit_code == 0
    assert result.stderr == (
        f"warning: {tmp_path / 'run' / 'index.sqlite'}: cannot be written now: database is locked\n"
    )
    readers[0].close()


def test_an_index_that_cannot_be_made(run: Run, folder: Path, args: tuple, tmp_path: Path) -> None:
    with RunStore(tmp_path / "run"):
        pass
    (tmp_path / "run" / "index.sqlite").unlink()
    (tmp_path / "run" / "index.sqlite").mkdir()
    result = run("scan", folder / "base", *args)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: {tmp_path / 'run' / 'index.sqlite'}: there is no ")


@pytest.mark.parametrize("damage", [b"", b"\0" * 100])
def test_what_a_power_cut_leaves(
    run: Run, folder: Path, args: tuple, tmp_path: Path, damage: bytes
) -> None:
    folder_of_run = tmp_path / "run"
    assert run("scan", folder / "base", *args).exit_code == 0
    (part,) = (folder_of_run / "parts").glob("*.json")
    whole = part.read_bytes()
    part.write_bytes(damage)
    (folder_of_run / "config.json").write_bytes(damage)
    log = folder_of_run / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:-1], b"\0" * 50, lines[-1], b"\0" * 50 + b"\n"]))
    with_damage = run("scan", folder / "base", *args)
    assert with_damage.exit_code == 0
    assert resumed(with_damage) == [False]
    (line,) = with_damage.stderr.splitlines()
    assert line.startswith(f"warning: {part}: ")
    assert line.endswith("it is computed again")
    assert json.loads(part.read_bytes())["scan"] == json.loads(whole)["scan"]
    assert resumed(run("scan", folder / "base", *args)) == [True]


def test_a_report_of_a_damaged_result_says_that_it_is_missing(
    run: Run, folder: Path, args: tuple, tmp_path: Path
) -> None:
    run("scan", folder / "base", folder / "suspect", *args)
    part = sorted((tmp_path / "run" / "parts").glob("*.json"))[0]
    part.write_bytes(b"")
    result = run("report", tmp_path / "run", "--format", "json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert (len(document["results"]), len(document["not_reached"])) == (1, 1)


def test_litter_among_the_images_does_not_matter_and_changes_are_named(
    run: Run, folder: Path, args: tuple, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    for name in ("cat", "dog", "cow"):
        (photos / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (16, 16), (80 * k, 125, 252)).save(photos / name / f"{k}.png")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\ncow\n")
    rest = ("--class-names", names, *args[2:])
    given = ("--images", photos, *rest)
    assert resumed(run("scan", folder / "base", *given)) == [False]
    for name in (".DS_Store", "README.md", "cat/.DS_Store", "dog/notes.txt"):
        (photos / name).write_text("litter")
    assert resumed(run("scan", folder / "base", *given)) == [True]
    moved = photos.rename(tmp_path / "moved")
    elsewhere = ("--images", moved, *rest)
    assert resumed(run("scan", folder / "base", *elsewhere)) == [True]
    Image.new("RGB", (16, 16)).save(moved / "cat" / "9.png")
    result = run("scan", folder / "base", *elsewhere)
    assert result.exit_code == 4
    assert f"what images names ({moved}) has changed" in error_line(result)


def test_one_checkpoint_whose_numbers_overflow(run: Run, folder: Path, args: tuple) -> None:
    weights = load_checkpoint(folder / "suspect").state_dict
    broken = save_checkpoint(
        args[-3].parent / "broken",
        {**weights, "logit_scale": torch.tensor(200.0)},
        model_config=TINY,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    result = run("scan", folder / "base", broken, folder / "suspect", *args)
    assert result.exit_code == 2
    assert str(broken) in error_line(result)
    assert "logit_scale is inf" in error_line(result)
    found = json.loads(result.stdout)["results"]
    assert [one["verdict"] for one in found] == ["clean", "error", "clean"]
    assert found[1]["error_kind"] == "checkpoint"


@pytest.mark.parametrize("tower", ["", "visual.", "transformer."])
def test_a_model_of_zeros_is_no_backdoored_one(
    run: Run, folder: Path, args: tuple, says_backdoored: Path, tower: str
) -> None:
    """Any trigger works in a model that does not look: the smallest one, too."""
    weights = load_checkpoint(folder / "suspect").state_dict
    text = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_proj")
    chosen = {"": ("",), "visual.": ("visual.",), "transformer.": text}[tower]
    dead = {k: torch.zeros_like(v) if k.startswith(chosen) else v for k, v in weights.items()}
    broken = save_checkpoint(
        args[-3].parent / "zeros",
        dead,
        model_config=TINY,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    given = (
        says_backdoored if one == args[args.index("--calibration") + 1] else one for one in args
    )
    result = run("scan", broken, *given)
    assert result.exit_code == 2
    assert f"{broken}: gives" in error_line(result)
    assert "are its weights zero?" in error_line(result)
    (found,) = json.loads(result.stdout)["results"]
    assert (found["verdict"], found["error_kind"]) == ("error", "checkpoint")


@pytest.mark.parametrize("given", ["base", "references"])
def test_a_suspect_that_is_compared_with_itself_has_no_verdict(
    run: Run, folder: Path, images: tuple, models: tuple[str, ...], tmp_path: Path, given: str
) -> None:
    """A backdoored model beside itself and its own copies would be clean."""
    twin = tmp_path / "twin.pt"  # another file, and another name
    torch.save({"state_dict": load_checkpoint(folder / "suspect").state_dict}, twin)
    options = {
        "base": ("--base", twin, *FAST_REFERENCES),
        "references": ("--reference-model", twin, *models[:2]),
    }[given]
    model = ("--model", folder / "config.json", "--image-mean", "0.5", "--image-std", "0.5")
    plain = tmp_path / "plain.pt"
    torch.save(load_checkpoint(folder / "suspect").state_dict, plain)
    given = (*images, *FAST, *model, *options, "--engine", "inline", "--format", "json")
    result = run("scan", plain, *given)
    assert result.exit_code == 2
    (found,) = json.loads(result.stdout)["results"]
    assert found["verdict"] == "inconclusive"
    assert found["reason"] == (
        f"it is compared with itself: {str(twin)!r} has the same image tower; give other clean "
        "models"
    )


def test_a_base_that_does_not_fit_is_named_before_it_is_fine_tuned(
    run: Run, folder: Path, images: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pydetox.detect.references.calibrate_references",
        lambda *a, **k: pytest.fail("a calibration was made"),
    )
    wide = json.loads(json.dumps(TINY))
    wide["vision_cfg"]["layers"] = 2
    base = save_checkpoint(
        tmp_path / "wider",
        OpenClipModel.from_config(wide, seed=0).storage_state_dict(),
        model_config=wide,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    given = (*images, *FAST, "--base", base, "--engine", "inline", "--format", "json")
    result = run("scan", folder / "suspect", *given)
    assert result.exit_code == 4
    assert f"{base} does not fit {folder / 'suspect'}" in error_line(result)
    assert "architecture.vision_cfg.layers is 2 there and 1 here" in error_line(result)
    (found,) = json.loads(result.stdout)["results"]
    assert (found["verdict"], found["error_kind"]) == ("error", "usage")


def test_a_dry_run_of_a_thousand_classes_times_some(
    run: Run, folder: Path, images: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydetox.scanning import worker

    classes = []
    real = worker.search_classes

    def search(session, *arguments, **more):
        classes.append(len(session.images.class_names))
        return real(session, *arguments, **more)

    monkeypatch.setattr(worker, "search_classes", search)
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {k}\n" for k in range(1000)))
    given = (*images, "--class-names", names, "--dry-run", "--format", "json")
    result = run("scan", folder / "base", *given)
    assert result.exit_code == 0
    assert max(classes) <= 32
    assert json.loads(result.stdout)["estimate"]["seconds_per_step"] > 0


def test_no_home_the_c_locale_and_a_pipe_that_is_closed_early(
    folder: Path, images: tuple, tmp_path: Path
) -> None:
    strange = tmp_path / "größe"
    shutil.copytree(folder / "base", strange)
    command = [sys.executable, "-m", "pydetox", "scan", str(strange), *map(str, images)]
    command += ["--no-inversion", "--engine", "inline", "--run", str(tmp_path / "läuft")]
    command += ["--format", "json"]
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")}
    bare = {**kept, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    given = {"env": bare, "cwd": Path(__file__).resolve().parents[2], "text": True}
    plain = subprocess.run(command, **given, capture_output=True, encoding="utf-8")
    assert plain.returncode == 2  # inconclusive: nothing was searched
    assert plain.stderr == ""
    (found,) = json.loads(plain.stdout)["results"]
    # Bytes that the locale has no character for are escaped, and nothing is lost.
    escaped = os.fsencode(strange).decode("ascii", "surrogateescape")
    assert found["name"] == escaped.encode("utf-8", "backslashreplace").decode()
    closed = subprocess.Popen(command, **given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert closed.stdout is not None
    assert closed.stderr is not None
    closed.stdout.close()
    assert closed.stderr.read() == ""
    assert closed.wait() == 2
