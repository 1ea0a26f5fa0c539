"""Whatever goes wrong: one clear line, the right exit code, nothing half-written, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pydetox.checkpoints import load_checkpoint
from pydetox.reporting.html import page

from .conftest import FAST, TINY, Run, error_line, write_images


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "suspect").state_dict


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class TestCheckpoints:
    """The commands that take a checkpoint all read it in the same way."""

    def check(self, run: Run, folder: Path, path: Path, *words: str) -> None:
        tmp_path = path.parent
        before = snapshot(tmp_path)
        common = ("--images", folder / "images.npz", "--model", folder / "config.json", *FAST)
        for args in (
            ("scan", path, *common),
            ("invert", path, *common, "--output", tmp_path / "out"),
            ("unlearn", path, *common, "--output", tmp_path / "out", "--force-target", "cat"),
            ("eval", path, *common[:4]),
        ):
            result = run(*args)
            assert result.exit_code == 2
            line = error_line(result)
            assert str(path) in line
            assert all(word in line for word in words), line
            if args[0] == "scan":  # what was not scanned is not clean
                assert "not scanned" in result.stdout
                assert "clean" not in result.stdout.replace("clean base", "")
            else:
                assert result.stdout == ""
            assert snapshot(tmp_path) == before

    def test_missing(self, run: Run, folder: Path, tmp_path: Path) -> None:
        self.check(run, folder, tmp_path / "nothing.pt", "no such file")

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 4096, b"PK\x03\x04" + b"x" * 9])
    def test_garbage(
        self, run: Run, folder: Path, tmp_path: Path, suffix: str, content: bytes
    ) -> None:
        path = tmp_path / f"model{suffix}"
        path.write_bytes(content)
        self.check(run, folder, path)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("share", [0.3, 0.99])
    def test_truncated(
        self,
        run: Run,
        folder: Path,
        tmp_path: Path,
        weights: dict[str, torch.Tensor],
        suffix: str,
        share: float,
    ) -> None:
        whole, path = tmp_path / f"whole{suffix}", tmp_path / f"model{suffix}"
        if suffix == ".pt":
            torch.save(weights, whole)
            content = whole.read_bytes()
            whole.unlink()
        else:
            content = (folder / "suspect" / "open_clip_model.safetensors").read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.check(run, folder, path)

    def test_a_pickle_that_runs_code(
        self, run: Run, folder: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        marker, path = tmp_path / "executed", tmp_path / "model.pt"
        torch.save({"state_dict": weights, "extra": Payload(marker)}, path)
        self.check(run, folder, path, "mkdir")
        path.write_bytes(pickle.dumps(Payload(marker)))
        self.check(run, folder, path)
        assert not marker.exists()

    def test_missing_and_extra_keys(
        self, run: Run, folder: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        path = tmp_path / "model.pt"
        torch.save({k: v for k, v in weights.items() if k != "visual.proj"}, path)
        self.check(run, folder, path, "visual.proj")
        torch.save(weights | {"visual.surprise": torch.zeros(1)}, path)
        self.check(run, folder, path, "visual.surprise")

    def test_wrong_architecture(
        self, run: Run, folder: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        path = tmp_path / "model.pt"
        torch.save(weights, path)
        other = tmp_path / "other.json"
        other.write_text(json.dumps(TINY | {"embed_dim": 24}))
        args = ("--images", folder / "images.npz", *FAST, "--model", other)
        result = run("scan", path, *args)
        assert result.exit_code == 2
        assert "do not fit the architecture" in error_line(result)
        assert "nothing tells its architecture" in error_line(run("scan", path, *args[:-2]))
        unknown = run("scan", path, *args[:-1], "ViT-B-99")
        assert unknown.exit_code == 4
        assert "ViT-B-99" in error_line(unknown)

    def test_nan_weights(
        self, run: Run, folder: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        path = tmp_path / "model.pt"
        broken = weights["visual.proj"].clone()
        broken[0, 0] = float("nan")
        torch.save(weights | {"visual.proj": broken}, path)
        self.check(run, folder, path, "visual.proj")

    def test_a_base_that_cannot_be_read(self, run: Run, folder: Path, images: tuple) -> None:
        result = run("scan", folder / "suspect", *images, *FAST, "--base", folder / "nothing")
        assert result.exit_code == 2
        assert result.stdout == ""
        error_line(result)


class TestImages:
    def scan(self, run: Run, folder: Path, spec: object, *more: object, code: int = 2) -> str:
        result = run("scan", folder / "suspect", "--images", spec, *FAST, *more)
        assert result.exit_code == code
        assert "clean" not in result.stdout.replace("clean base", "")
        return error_line(result)

    def test_missing(self, run: Run, folder: Path, tmp_path: Path) -> None:
        assert "no such file or folder" in self.scan(run, folder, tmp_path / "nothing")

    def test_zero(self, run: Run, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "zero images" in self.scan(run, folder, tmp_path / "empty")
        none = np.zeros((0, 16, 16, 3), np.uint8)
        path = write_images(tmp_path / "zero.npz", 3, images=none, labels=None)
        assert "zero images" in self.scan(run, folder, path)

    def test_one(self, run: Run, folder: Path, tmp_path: Path) -> None:
        path = write_images(tmp_path / "one.npz", 1)
        assert "needs at least 2" in self.scan(run, folder, path)
        result = run(
            *("unlearn", folder / "suspect", "--images", path, *FAST, "--force-target", "cat"),
            *("--output", tmp_path / "out"),
        )
        assert result.exit_code == 2
        error_line(result)
        assert not (tmp_path / "out").exists()

    def test_another_size(self, run: Run, folder: Path, tmp_path: Path) -> None:
        path = write_images(tmp_path / "large.npz", 6, size=20)
        assert "20x20 pixels; expected 16x16" in self.scan(run, folder, path)
        result = run("scan", folder / "suspect", "--images", path, *FAST, "--resize")
        assert result.stderr == ""

    def test_no_class_names(self, run: Run, folder: Path, tmp_path: Path) -> None:
        path = write_images(tmp_path / "bare.npz", 6, class_names=None)
        assert "--class-names" in self.scan(run, folder, path)

    def test_unknown_class_names(self, run: Run, folder: Path, tmp_path: Path) -> None:
        names = tmp_path / "names.txt"
        names.write_text("cat\ndog\nunicorn\n")
        spec = folder / "images.npz"
        assert "'cow' is not one of" in self.scan(run, folder, spec, "--class-names", names)
        missing = ("--class-names", tmp_path / "nothing.txt")
        assert "cannot read class names" in self.scan(run, folder, spec, *missing)

    def test_templates_without_a_place(self, run: Run, folder: Path, tmp_path: Path) -> None:
        templates = tmp_path / "templates.txt"
        templates.write_text("a photo\n")
        spec = folder / "images.npz"
        assert "no place for the class" in self.scan(run, folder, spec, "--templates", templates)

    def test_a_damaged_picture(self, run: Run, folder: Path, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
            Image.new("RGB", (16, 16)).save(tmp_path / name / "good.png")
        (tmp_path / "dog" / "bad.png").write_bytes(b"\x89PNG no")
        assert "bad.png" in self.scan(run, folder, tmp_path, "--strict")


class TestOutputs:
    def each(self, folder: Path, images: tuple, output: Path) -> list[tuple]:
        common = (folder / "suspect", *images, *FAST)
        direct = ("--force-target", "cat", "--vector-steps", "2")
        return [
            ("scan", *common, "--output", output),
            ("scan", *common, "--report", output),
            ("invert", *common, "--output", output, "--target", "cat"),
            ("unlearn", *common, *direct, "--output", output),
        ]

    def test_below_a_file(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("mine")
        monkeypatch.setattr("pydetox.cli.inputs.load_checkpoint", too_late)
        for args in self.each(folder, images, tmp_path / "file" / "output"):
            result = run(*args)
            assert result.exit_code == 2
            assert "cannot be written" in error_line(result)
            assert snapshot(tmp_path) == {"file": b"mine"}

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
    def test_no_permission(
        self,
        run: Run,
        folder: Path,
        images: tuple,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        code: int,
    ) -> None:
        """As the system says it; the tests may run as root, whom no permission stops."""
        real_open, real_mkdir = os.open, Path.mkdir

        def refuse(path: Any) -> None:
            if os.fspath(path).startswith(str(tmp_path)):
                raise OSError(code, os.strerror(code), os.fspath(path))

        def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_CREAT:
                refuse(path)
            return real_open(path, flags, *args, **options)

        def mkdir(self: Path, *args: Any, **options: Any) -> None:
            if self != tmp_path:
                refuse(self)
            real_mkdir(self, *args, **options)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr("pydetox.cli.inputs.load_checkpoint", too_late)
        for args in self.each(folder, images, tmp_path / "output"):
            result = run(*args)
            assert result.exit_code == 2
            assert "cannot be written" in error_line(result)
            assert snapshot(tmp_path) == {}

    def test_a_folder_that_is_taken(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "thesis.tex").write_text("mine")
        before = snapshot(tmp_path)
        monkeypatch.setattr("pydetox.cli.inputs.load_checkpoint", too_late)
        for args in self.each(folder, images, tmp_path / "output"):
            overwrite = ("--overwrite",) * (args[0] in ("invert", "unlearn"))
            for more in {(), overwrite}:
                result = run(*args, *more)
                assert result.exit_code == 2
                error_line(result)
                assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
    def test_a_disk_that_fills_up_and_ctrl_c_while_writing(
        self,
        run: Run,
        folder: Path,
        images: tuple,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        failure: BaseException,
    ) -> None:
        """At the last moment: everything is written but not yet safe on the disk."""
        for number, args in enumerate(self.each(folder, images, tmp_path / "output")):
            if args[0] in ("invert", "unlearn"):
                assert run(*args).exit_code in (0, 2)
                args = (*args, "--overwrite")
            else:
                (tmp_path / "output").write_text("pydetox scan\nan earlier one\n")
            before = snapshot(tmp_path)
            assert before, number

            def fail(descriptor: int) -> None:
                raise failure

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fail)
                result = run(*args)
            if isinstance(failure, OSError):
                assert result.exit_code == 2
                assert "no space left on the disk" in error_line(result)
            else:
                assert result.exit_code == 130
                # Of slow work, how long it takes is told before.
                assert result.stderr.strip().splitlines()[-1] == "error: interrupted"
            assert result.stdout == ""
            assert snapshot(tmp_path) == before
            for path in sorted(tmp_path.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()


def too_late(*_: object, **__: object) -> Any:
    raise AssertionError("the output is checked before the work")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "signal_"),
    [("scan", signal.SIGINT), ("unlearn", signal.SIGINT), ("scan", signal.SIGTERM)],
)
def test_a_signal_during_the_work(
    folder: Path, images: tuple, tmp_path: Path, command: str, signal_: signal.Signals
) -> None:
    old = tmp_path / "old.html"
    old.write_text(page("pydetox scan", "an earlier one", []))
    before = snapshot(tmp_path)
    output = tmp_path / "new" / "output"
    more = ("--force-target", "cat") if command == "unlearn" else ()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pydetox", command, folder / "suspect", *images),
            *("--steps", "10000", "--restarts", "500", "--output", output, "--report", old, *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with Ctrl-C switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 120
        while not output.parent.exists():  # it is made just before the work starts
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2)
        process.send_signal(signal_)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stdout == ""
    if signal_ == signal.SIGINT:
        assert process.returncode == 130
        said, _, last = stderr.strip().rpartition("\n")
        assert last == "error: interrupted"
        assert not said or said.startswith("at most about")  # the estimate of `unlearn`
    else:
        assert process.returncode == 143
    assert snapshot(tmp_path) == {**before, "new": None}
