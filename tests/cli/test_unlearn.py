from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pydetox import InversionConfig, UnlearnConfig, detox, load_images
from pydetox.checkpoints import load_checkpoint
from pydetox.detect.calibration_file import read_calibration
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.result import ScanResult
from pydetox.errors import OutputError
from pydetox.inversion.trigger_file import load_triggers

from .conftest import FAST, FAST_REFERENCES, Run, error_line

QUICK = (*FAST, "--vector-steps", "2")
STRONG = (*FAST, "--vector-steps", "20", "--vector-learning-rate", "0.01")


@pytest.fixture
def verdicts(
    monkeypatch: pytest.MonkeyPatch, says_clean: Path, says_backdoored: Path
) -> Callable[..., None]:
    """`verdicts("backdoored", "clean")`: what the next scans find, by what they compare with."""
    real = sys.modules["pydetox.detect.scan"].detect  # says_* have put a stand-in there
    references = {
        "clean": read_calibration(says_clean),
        "backdoored": read_calibration(says_backdoored),
        "inconclusive": None,
    }

    def set_up(*names: str) -> None:
        # A scan asks once for each family.
        coming = iter([name for name in names for _ in ScanConfig().families])

        def detect(sizes: Any, _: Any, **options: Any) -> Any:
            return real(sizes, references[next(coming)], **options)

        monkeypatch.setattr("pydetox.detect.scan.detect", detect)
        # What a scan is told to find it finds in any class, not only in those suspect before.
        monkeypatch.setattr(ScanResult, "cleared", lambda _: ())

    return set_up


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_checkpoint(first).state_dict, load_checkpoint(second).state_dict
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class TestUnknownTrigger:
    def test_a_clean_model_is_left_alone(
        self, run: Run, folder: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "repaired"
        args = (*images, *QUICK, "--calibration", says_clean, "--output", output)
        result = run("unlearn", folder / "suspect", *args, "--format", "json")
        assert result.exit_code == 0
        content = json.loads(result.stdout)
        assert content["schema"] == "pydetox.unlearn/1"
        assert content["verdict"] == "clean"
        assert content["rounds"] == []
        assert content["path"] is None
        assert not output.exists()

    def test_repaired_is_0(
        self,
        run: Run,
        folder: Path,
        images: tuple,
        verdicts: Callable[..., None],
        says_backdoored: Path,
        tmp_path: Path,
    ) -> None:
        verdicts("backdoored", "clean")
        output, report = tmp_path / "deep" / "repaired", tmp_path / "report.html"
        result = run(
            *("unlearn", folder / "suspect", *images, *QUICK, "--calibration", says_backdoored),
            *("--output", output, "--report", report, "--format", "json"),
        )
        assert result.exit_code == 0, result.stderr
        content = json.loads(result.stdout)
        assert content["repaired"] is True
        assert [scan["verdict"] for scan in content["scans"]] == ["backdoored", "clean"]
        assert content["rounds"][0]["target_name"] == content["scans"][0]["target"]
        assert content["path"] == str(output)
        assert [row["name"] for row in content["evaluation"]] == ["before", "after"]

        repaired = load_checkpoint(output)
        told = repaired.provenance
        assert told is not None
        assert told.source_sha256 == content["sha256"]
        assert told.source_sha256 == load_checkpoint(folder / "suspect").sha256
        assert told.scaling_coefficient == content["rounds"][-1]["alpha"]
        assert told.method == "TBAR, unknown trigger, forget vector"
        assert told.extra["verdict_after"] == "clean"
        page = report.read_text()
        assert page.count("data:image/png;base64,") == 6
        assert "before" in page

    @pytest.mark.parametrize(
        ("found", "code"),
        [
            (("backdoored", "backdoored"), 1),
            (("backdoored", "inconclusive"), 2),
            (("inconclusive",), 2),
        ],
    )
    def test_not_repaired(
        self,
        run: Run,
        folder: Path,
        images: tuple,
        verdicts: Callable[..., None],
        says_backdoored: Path,
        tmp_path: Path,
        found: tuple[str, ...],
        code: int,
    ) -> None:
        verdicts(*found)
        result = run(
            *("unlearn", folder / "suspect", *images, *QUICK, "--calibration", says_backdoored),
            *("--output", tmp_path / "repaired", "--max-rounds", "1"),
        )
        assert result.exit_code == code, result.stderr
        assert (tmp_path / "repaired").exists() == (len(found) > 1)
        assert result.stdout.startswith("pydetox unlearn\n")

    def test_with_a_base(self, run: Run, folder: Path, images: tuple, tmp_path: Path) -> None:
        result = run(
            *("unlearn", folder / "base", *images, *QUICK, *FAST_REFERENCES),
            *("--base", folder / "base", "--output", tmp_path / "repaired", "--format", "json"),
        )
        content = json.loads(result.stdout)
        assert content["calibration"]["models"][0] == str(folder / "base")
        assert list(content["seconds"])[:2] == ["read", "calibrate"]

    def test_the_vector_leads_to_the_base_unless_told_otherwise(
        self,
        run: Run,
        folder: Path,
        images: tuple,
        says_backdoored: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen = []

        def repair_session(_session: Any, _plan: Any, unlearning: UnlearnConfig, **_: Any) -> None:
            seen.append(unlearning.toward_base)
            raise OutputError("enough")

        monkeypatch.setattr("pydetox.repair.detox.repair_session", repair_session)
        for option in ((), ("--anywhere",)):
            run(
                *("unlearn", folder / "suspect", *images, "--calibration", says_backdoored),
                *("--output", tmp_path / "repaired", *option),
            )
        assert seen == [True, False]

    def test_needs_something_to_compare_with(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        result = run("unlearn", folder / "suspect", *images, "--output", tmp_path / "x")
        assert result.exit_code == 4
        assert "--base" in error_line(result)


class TestDirect:
    @pytest.fixture
    def trigger(self, tmp_path: Path) -> Path:
        """A large black patch, which the suspect takes for a cow; in a file without metadata."""
        return self.patch(tmp_path, 12, 0.0)

    def patch(self, folder: Path, side: int, colour: float) -> Path:
        mask, pattern = torch.zeros(1, 16, 16), torch.full((1, 3, 16, 16), colour)
        mask[:, :side, :side] = 1
        save_file({"mask": mask, "pattern": pattern}, folder / "patch.safetensors")
        return folder / "patch.safetensors"

    def test_known_trigger(
        self,
        run: Run,
        folder: Path,
        images: tuple,
        says_clean: Path,
        trigger: Path,
        tmp_path: Path,
    ) -> None:
        output = tmp_path / "repaired"
        result = run(
            *("unlearn", folder / "suspect", *images, *STRONG, "--calibration", says_clean),
            *("--trigger", trigger, "--target", "cow", "--output", output, "--format", "json"),
        )
        assert result.exit_code == 0, result.stderr
        content = json.loads(result.stdout)
        assert len(content["rounds"]) == 1
        assert content["rounds"][0]["target_name"] == "cow"
        assert content["rounds"][0]["alpha_search"]["asr_kind"] == "known"
        before, after = content["evaluation"]
        assert before["n_attack"] == 16
        assert before["asr"] > after["asr"]
        provenance = load_checkpoint(output).provenance
        assert provenance.method == "TBAR, known trigger, forget vector"
        assert provenance.source_sha256 == load_checkpoint(folder / "suspect").sha256
        assert provenance.before["attack_success_rate"] == before["asr"]
        search = content["rounds"][0]["alpha_search"]
        assert len(search["drift"]) == len(search["alpha"])
        assert set(search["pareto"]) <= set(search["alpha"])
        assert content["drift"]["images"] == 256
        at_chosen = search["drift"][search["alpha"].index(search["chosen"])]
        assert content["drift"]["mean_distance"] == pytest.approx(at_chosen, abs=1e-6)
        assert provenance.extra["feature_drift"] == content["drift"]

    def test_where_the_limits_forbid_it_a_compromise_is_offered_and_nothing_written(
        self, run: Run, folder: Path, images: tuple, trigger: Path, tmp_path: Path
    ) -> None:
        args = (
            *("unlearn", folder / "suspect", *images, *STRONG, "--trigger", trigger),
            *("--target", "cow", "--output", tmp_path / "repaired"),
        )
        strict = ("--max-drift", 1e-9, "--report", tmp_path / "report.html")
        result = run(*args, *strict)
        assert not (tmp_path / "repaired").exists()
        text = " ".join(result.stdout.split())
        assert "no α keeps all limits; nothing subtracted" in text
        found = re.search(r"--min-accuracy-kept ([\d.]+) --max-drift ([\d.]+) allows it", text)
        assert found is not None
        assert "Pareto front" in (tmp_path / "report.html").read_text()
        offered = ("--min-accuracy-kept", found[1], "--max-drift", found[2])
        content = json.loads(run(*args, *offered, "--format", "json").stdout)
        assert content["rounds"][0]["limits_reached"]
        assert content["rounds"][0]["compromise"] is None
        assert (tmp_path / "repaired").exists()

    def test_it_does_what_python_does(
        self,
        run: Run,
        folder: Path,
        images: tuple,
        says_clean: Path,
        trigger: Path,
        tmp_path: Path,
    ) -> None:
        """One workflow: the same weights, and the same story of how they were made."""
        run(
            *("unlearn", folder / "suspect", *images, *STRONG, "--calibration", says_clean),
            *("--trigger", trigger, "--target", "cow", "--output", tmp_path / "typed"),
            *("--threads", 1),
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        detox(
            folder / "suspect",
            load_images(folder / "images.npz", image_size=16),
            calibration=read_calibration(says_clean),
            triggers=[load_triggers(trigger).trigger(0)],
            target="cow",
            config=ScanConfig(inversion=InversionConfig(steps=3, batch_size=1)),
            unlearning=UnlearnConfig(steps=20, learning_rate=0.01),
            output=tmp_path / "called",
        )
        torch.set_num_threads(threads)
        typed, called = (load_checkpoint(tmp_path / name) for name in ("typed", "called"))
        assert typed.provenance == called.provenance
        assert same_weights(tmp_path / "typed", tmp_path / "called")

    def test_known_trigger_without_calibration_has_no_verdict(
        self, run: Run, folder: Path, images: tuple, trigger: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "repaired"
        result = run(
            *("unlearn", folder / "suspect", *images, *STRONG, "--trigger", trigger),
            *("--target", "cow", "--output", output),
        )
        assert result.exit_code == 2
        assert "inconclusive" in result.stdout
        assert output.exists()

    def test_where_nothing_is_subtracted_nothing_is_written(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        without_effect = self.patch(tmp_path, 1, 0.0)
        result = run(
            *("unlearn", folder / "suspect", *images, *QUICK, "--trigger", without_effect),
            *("--target", "dog", "--output", tmp_path / "repaired", "--format", "json"),
        )
        content = json.loads(result.stdout)
        assert content["rounds"][0]["alpha"] == 0
        assert content["path"] is None
        assert not (tmp_path / "repaired").exists()

    def test_target_of_a_trigger_must_be_known(
        self, run: Run, folder: Path, images: tuple, trigger: Path, tmp_path: Path
    ) -> None:
        args = (*images, *QUICK, "--trigger", trigger, "--output", tmp_path / "x")
        assert "name one with --target" in error_line(run("unlearn", folder / "suspect", *args))
        result = run("unlearn", folder / "suspect", *args, "--target", "unicorn")
        assert "images.npz" in error_line(result)
        assert "'unicorn' is not in " in error_line(result)

    @pytest.mark.parametrize(("vector", "warps"), [("paired", 4), ("strengthen", 0)])
    def test_forced_target(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path, vector: str, warps: int
    ) -> None:
        output = tmp_path / "repaired"
        result = run(
            *("unlearn", folder / "suspect", *images, *QUICK, "--force-target", "cow"),
            *("--output", output, "--vector", vector, "--format", "json"),
            *("--warps", warps),
        )
        assert result.exit_code == 2  # there is nothing to compare the sizes with
        content = json.loads(result.stdout)
        assert content["rounds"][0]["target_name"] == "cow"
        assert 0 <= content["rounds"][0]["warps"] <= warps
        assert 0 <= content["rounds"][0]["waves"] <= 2
        assert content["rounds"][0]["alpha_search"]["asr_kind"] == "recovered"
        assert output.exists() == any(one["alpha"] for one in content["rounds"])
        if output.exists():
            assert not same_weights(output, folder / "suspect")
            made = load_checkpoint(output).provenance
            assert made.method == f"TBAR, unknown trigger, {vector} vector"

    def test_excluding_options(
        self, run: Run, folder: Path, images: tuple, trigger: Path, tmp_path: Path
    ) -> None:
        args = (*images, "--output", tmp_path / "x")
        both = ("--trigger", trigger, "--force-target", "cow")
        assert run("unlearn", folder / "suspect", *args, *both).exit_code == 4
