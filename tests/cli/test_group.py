from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pydetox.cli import cli
from pydetox.cli.group import _COMMANDS, explain, one_line

from .conftest import Run, error_line


def options_of(name: str) -> dict[str, click.Parameter]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {p.name: p for p in command.params if p.name}


class TestHelp:
    @pytest.mark.parametrize("name", ["", *_COMMANDS])
    def test_is_shown(self, run: Run, name: str) -> None:
        result = run(*[name] * bool(name), "--help")
        assert result.exit_code == 0
        assert result.stderr == ""
        assert result.stdout.startswith("Usage: pydetox")

    def test_lists_every_command(self, run: Run) -> None:
        text = run("--help").stdout
        assert all(f"\n  {name} " in text for name in _COMMANDS)

    @pytest.mark.parametrize("name", list(_COMMANDS))
    def test_every_option_has_help(self, name: str) -> None:
        for parameter in options_of(name).values():
            if isinstance(parameter, click.Option):
                assert parameter.help

    def test_defaults_are_those_of_the_library(self) -> None:
        from pydetox.detect.configuration import ScanConfig
        from pydetox.repair.configuration import UnlearnConfig

        scan, vector = ScanConfig(), UnlearnConfig()
        for name in ("scan", "unlearn"):
            defaults = {key: option.default for key, option in options_of(name).items()}
            assert defaults["objective"] == scan.objective
            assert defaults["steps"] == scan.inversion.steps
            assert defaults["batch_size"] == scan.inversion.batch_size
            assert defaults["precision"] == scan.inversion.precision
            assert defaults["restarts"] == scan.restarts
            assert tuple(defaults["families"].split(",")) == scan.families
            assert defaults["references"] == scan.references
            assert scan.reference_training is None
            assert defaults["reference_learning_rate"] == "auto"
            assert defaults["seed"] == scan.seed
        assert defaults["vector"] == vector.vector
        assert defaults["vector_steps"] == vector.steps
        assert vector.learning_rate is None
        assert defaults["vector_learning_rate"] == "auto"
        assert defaults["warps"] == vector.warps
        assert defaults["waves"] == vector.waves
        assert defaults["passes"] == vector.passes


class TestUsage:
    @pytest.mark.parametrize(
        "args",
        [
            [],
            ["nonsense"],
            ["--nonsense"],
            ["scan"],
            ["scan", "x"],
            ["scan", "x", "--images"],
            ["scan", "x", "--images", "y", "--steps", "0"],
            ["scan", "x", "--images", "y", "--steps", "many"],
            ["scan", "x", "--images", "y", "--seed", "-1"],
            ["scan", "x", "--images", "y", "--references", "1"],
            ["scan", "x", "--images", "y", "--reference-learning-rate", "0"],
            ["scan", "x", "--images", "y", "--reference-learning-rate", "some"],
            ["scan", "x", "--images", "y", "--reference-epochs", "3"],
            ["scan", "x", "--images", "y", "--quick", "--thorough"],
            ["scan", "x", "--images", "y", "--families", "patch,patch"],
            ["scan", "x", "--images", "y", "--objective", "z"],
            ["scan", "x", "--images", "y", "--format", "xml"],
            ["scan", "x", "--images", "y", "--device", "tpu"],
            ["scan", "x", "--images", "y", "--device", "cuda:99"],
            ["scan", "x", "--images", "y", "--save-calibration", "z"],
            ["scan", "hf-hub:../x", "--images", "y"],
            ["invert", "x", "--images", "y"],
            ["invert", "x", "--images", "y", "--output", "z", "--target"],
            ["unlearn", "x", "--images", "y", "--output", "z"],
            ["unlearn", "x", "--images", "y", "--output", "z", "--target", "t"],
            ["eval", "x"],
            ["eval", "x", "--images", "y", "--target", "t"],
            ["demo", "--seed", "x"],
            ["doctor", "x"],
        ],
    )
    def test_is_one_line_and_4(self, run: Run, args: list[str]) -> None:
        result = run(*args)
        assert result.exit_code == 4
        assert result.stdout == ""
        error_line(result)

    def test_names_the_command_whose_help_tells_more(self, run: Run) -> None:
        assert "(see: pydetox scan --help)" in error_line(run("scan", "--nonsense"))


class TestErrors:
    def test_escape_sequences_do_not_reach_the_terminal(self, run: Run) -> None:
        for args in (["\x1b[31mscan"], ["scan", "\x1b[31mx", "--images", "digits"]):
            result = run(*args)
            assert "\x1b" not in result.stdout + result.stderr
            assert result.exit_code in (2, 4)

    def test_one_line(self) -> None:
        assert one_line("a\nb \x1b[31m \u202e c") == "a b \ufffd[31m \ufffd c"

    def test_explain_knows_what_is_no_bug(self) -> None:
        assert explain(MemoryError()) == "out of memory"
        assert explain(OSError(2, "No such file", "x")) == "x: No such file"
        assert explain(RuntimeError("DefaultCPUAllocator: not enough memory: 5")) is not None
        assert explain(RuntimeError("something else")) is None

    def test_a_bug_is_2_and_shows_where(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> None:
            raise ZeroDivisionError("oops \x1b[31m")

        monkeypatch.setattr("pydetox.build_info", broken, raising=False)
        result = run("doctor")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: this is a bug in pydetox")
        assert "\x1b" not in result.stderr

    def test_out_of_memory_is_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def full() -> None:
            raise MemoryError

        monkeypatch.setattr("pydetox.build_info", full, raising=False)
        result = run("doctor")
        assert result.exit_code == 2
        assert error_line(result) == "error: out of memory"

    def test_ctrl_c_is_130(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("pydetox.build_info", interrupted, raising=False)
        result = run("doctor")
        assert result.exit_code == 130
        assert result.stderr.strip() == "error: interrupted"


class TestProcess:
    """What only a real process shows."""

    def test_version(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pydetox", "--version"], capture_output=True, text=True
        )
        assert done.returncode == 0
        assert done.stdout.startswith("pydetox ")
        assert done.stderr == ""

    def test_help_does_not_import_torch(self) -> None:
        code = (
            "import sys, contextlib\n"
            "from pydetox.cli import cli\n"
            "cli.main(['scan', '--help'], standalone_mode=False)\n"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

    @pytest.mark.parametrize("format_", ["text", "json"])
    def test_a_reader_that_closes_the_pipe_early_is_no_error(self, format_: str) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as stdout:
            done = subprocess.run(
                [sys.executable, "-m", "pydetox", "doctor", "--format", format_],
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 0
        assert done.stderr == ""

    def test_a_full_disk_behind_stdout(self) -> None:
        with Path("/dev/full").open("wb") as stdout:
            done = subprocess.run(
                [sys.executable, "-m", "pydetox", "doctor"],
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert len(done.stderr.splitlines()) == 1


class TestDoctor:
    def test_text(self, run: Run) -> None:
        import torch

        result = run("doctor")
        assert result.exit_code == 0
        assert torch.__version__ in result.stdout
        assert "CPU capability in use" in result.stdout

    def test_json(self, run: Run) -> None:
        from pydetox import build_info

        content = json.loads(run("doctor", "--format", "json").stdout)
        assert content.pop("schema") == "pydetox.doctor/1"
        assert content.pop("exit_code") == 0
        assert content == build_info()

    def test_every_fact_has_a_label(self) -> None:
        from pydetox import build_info
        from pydetox.cli.doctor import _LABELS

        assert set(build_info()) == set(_LABELS)

    def test_a_native_library_that_does_not_work(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pydetox", "doctor"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYDETOX_CPU_CAPABILITY": "abacus"},
        )
        assert done.returncode == 2
        assert "not loaded: " in done.stdout
        assert "abacus" in done.stdout


class TestDemo:
    @pytest.mark.parametrize(
        ("verdict", "code"), [("clean", 0), ("backdoored", 1), ("inconclusive", 2), (None, 2)]
    )
    def test_reports_what_the_demo_returns(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, verdict: str | None, code: int
    ) -> None:
        from pydetox.research.demo import DemoResult

        calls = []

        def run_demo(output: object, seed: int, *, device: object) -> DemoResult:
            calls.append((str(output), seed, str(device)))
            summary = {"rescan": {"verdict": verdict, "p_l1": 0.5}}
            return DemoResult(summary, {"title": "pydetox demo"})

        monkeypatch.setattr("pydetox.research.demo.run_demo", run_demo)
        result = run("demo", "--output", "here", "--seed", "7", "--format", "json")
        assert calls == [("here", 7, "cpu")]
        assert result.exit_code == code
        content = json.loads(result.stdout)
        assert content["schema"] == "pydetox.demo/1"
        assert content["rescan"] == {"verdict": verdict, "p_l1": 0.5}
        assert content["seed"] == 7
