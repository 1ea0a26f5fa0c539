from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import FAST, FAST_REFERENCES, Run, calibration_file, error_line


def sizes(result: dict) -> dict:
    """The P-L1 of each class by family: which family comes first depends on the calibration."""
    others = {one["family"]: one["class_p_l1"] for one in result["other_families"]}
    return {result["family"]: result["class_p_l1"], **others}


def parse(text: str) -> dict:
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert content["schema"] == "pydetox.scan/2"
    return content


class TestVerdicts:
    def test_clean_is_0(self, run: Run, folder: Path, images: tuple, says_clean: Path) -> None:
        result = run("scan", folder / "suspect", *images, *FAST, "--calibration", says_clean)
        assert result.exit_code == 0
        assert "clean" in result.stdout
        assert result.stderr == ""
        assert "P-L1: the size of a trigger" in " ".join(result.stdout.split())

    def test_backdoored_is_1(
        self, run: Run, folder: Path, images: tuple, says_backdoored: Path
    ) -> None:
        args = ("--calibration", says_backdoored, "--format", "json")
        result = run("scan", folder / "suspect", *images, *FAST, *args)
        assert result.exit_code == 1
        content = parse(result.stdout)
        assert content["exit_code"] == 1
        (found,) = content["results"]
        assert found["verdict"] == "backdoored"
        assert found["target"] in ("cat", "dog", "cow")
        assert found["error"] is None
        assert 0 < found["p_l1"] < 0.1
        assert len(found["sha256"]) == 64

    def test_no_calibration_is_2(self, run: Run, folder: Path, images: tuple) -> None:
        result = run("scan", folder / "suspect", *images, *FAST, "--format", "json")
        assert result.exit_code == 2
        content = parse(result.stdout)
        assert content["results"][0]["verdict"] == "inconclusive"
        assert content["calibration"] is None

    def test_label_free(self, run: Run, folder: Path, images: tuple) -> None:
        args = (*images, *FAST, *FAST_REFERENCES, "--batch-size", "4")
        args = (*args, "--objective", "label-free", "--format", "json")
        result = run("scan", folder / "suspect", *args, "--base", folder / "base")
        content = parse(result.stdout)
        (found,) = content["results"]
        assert found["objective"] == "label-free"
        assert len(found["class_p_l1"]) == 1
        assert result.exit_code == {"clean": 0, "inconclusive": 2}.get(found["verdict"], 1)

    def test_the_same_seed_gives_the_same_result(
        self, run: Run, folder: Path, images: tuple
    ) -> None:
        def sizes(seed: int) -> list:
            result = run(
                *("scan", folder / "suspect", *images, *FAST, "--format", "json", "--seed", seed)
            )
            return parse(result.stdout)["results"][0]["class_p_l1"]

        assert sizes(3) == sizes(3)
        assert sizes(3) != sizes(4)

    def test_restarts_keep_one_value_per_class(self, run: Run, folder: Path, images: tuple) -> None:
        args = ("--restarts", "2", "--format", "json")
        result = run("scan", folder / "suspect", *images, *FAST, *args)
        assert len(parse(result.stdout)["results"][0]["class_p_l1"]) == 3


class TestSeveral:
    def test_an_error_does_not_stop_the_others(
        self, run: Run, folder: Path, images: tuple, says_clean: Path
    ) -> None:
        names = [folder / "nothing", folder / "suspect", folder / "base"]
        args = (*images, *FAST, "--calibration", says_clean, "--format", "json")
        result = run("scan", *names, *args)
        assert result.exit_code == 2
        assert "no such file or folder" in error_line(result)
        content = parse(result.stdout)
        assert [r["name"] for r in content["results"]] == list(map(str, names))
        # In a process of its own, where nothing stands in for the statistics: one answer to all
        # images, so no verdict.
        verdicts = [r["verdict"] for r in content["results"]]
        assert verdicts == ["error", "inconclusive", "inconclusive"]
        assert "no such file or folder" in content["results"][0]["error"]

    def test_an_error_outranks_a_backdoor(
        self, run: Run, folder: Path, images: tuple, says_backdoored: Path
    ) -> None:
        args = (*images, *FAST, "--calibration", says_backdoored)
        result = run("scan", folder / "suspect", folder / "nothing", *args)
        assert result.exit_code == 2
        assert "inconclusive" in result.stdout
        assert "not scanned" in result.stdout

    def test_a_bug_in_one_is_not_hidden(
        self, run: Run, folder: Path, images: tuple, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pydetox.scanning.worker.scan_session", lambda *a, **k: 1 / 0)
        result = run("scan", folder / "suspect", *images, *FAST)
        assert result.exit_code == 2
        assert "ZeroDivisionError" in result.stderr
        assert result.stdout == ""


class TestCalibration:
    def test_round_trip(self, run: Run, folder: Path, images: tuple, tmp_path: Path) -> None:
        saved = tmp_path / "deep" / "calibration.json"
        common = (folder / "suspect", *images, *FAST, "--format", "json")
        made = run(
            *("scan", *common, *FAST_REFERENCES, "--base", folder / "base"),
            *("--save-calibration", saved),
        )
        used = run("scan", *common, "--calibration", saved)
        first, second = parse(made.stdout), parse(used.stdout)
        for content in (first, second):
            for of_the_base in ("seconds", "weights", "key"):
                content["results"][0].pop(of_the_base)
        assert first == second
        assert first["calibration"]["models"] == [
            str(folder / "base"),
            f"{folder / 'base'}, fine-tuned 1",
        ]
        assert used.exit_code == made.exit_code

    def test_classes_are_dropped_unless_all_are_wanted(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        saved = tmp_path / "calibration.json"
        common = (folder / "suspect", *images, "--steps", "70", "--batch-size", "1")
        common = (*common, "--format", "json")
        whole = run(
            *("scan", *common, *FAST_REFERENCES, "--base", folder / "base", "--keep-all"),
            *("--save-calibration", saved),
        )
        content = json.loads(saved.read_text())
        assert content["recorded_steps"] == [10, 20, 30, 40, 50, 60, 70]
        (every,) = parse(whole.stdout)["results"]
        assert every["class_dropped"] == [None, None, None]
        # No class that the others are judged beside is given up: of three classes none.
        (few,) = parse(run("scan", *common, "--calibration", saved).stdout)["results"]
        assert few["class_dropped"] == [None, None, None]
        assert sizes(few) == sizes(every)
        (kept,) = parse(run("scan", *common, "--calibration", saved, "--keep-all").stdout)[
            "results"
        ]
        assert kept["class_dropped"] == [None, None, None]
        assert sizes(kept) == sizes(every)

    @pytest.mark.parametrize(
        "changes",
        [("--steps", "4"), ("--restarts", "2"), ("--objective", "label-free")],
    )
    def test_of_another_search_is_4(
        self, run: Run, folder: Path, images: tuple, says_clean: Path, changes: tuple
    ) -> None:
        args = (*images, *FAST, "--calibration", says_clean, *changes)
        result = run("scan", folder / "suspect", *args)
        assert result.exit_code == 4
        assert "the calibration does not fit this scan: " in error_line(result)

    def test_of_other_classes_is_4(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        other = calibration_file(
            tmp_path / "other.json", folder / "images.npz", 0.5, ("cat", "dog", "mouse")
        )
        result = run("scan", folder / "suspect", *images, *FAST, "--calibration", other)
        assert result.exit_code == 4

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "garbage",
            "[]",
            "{}",
            '{"schema": "pydetox.calibration/3"}',
            '{"schema": "pydetox.calibration/1"}',
            '{"schema": "pydetox.calibration/3", "p_l1": [[1]], "key": "", '
            '"models": [], "recorded_steps": [], "history": [], "family": "patch", '
            '"others": [], "relative": false}',
            '{"schema": "pydetox.calibration/3", "p_l1": [[0], [1]], "key": "", '
            '"models": [], "recorded_steps": [], "history": [], "family": "patch", '
            '"others": [], "relative": false}',
            '{"schema": "pydetox.calibration/3", "p_l1": [[NaN], [1]], "key": "", '
            '"models": [], "recorded_steps": [], "history": [], "family": "patch", '
            '"others": [], "relative": false}',
            '{"schema": "pydetox.calibration/3", "p_l1": 5, "key": "", "models": []}',
            "[" * 100_000,
        ],
    )
    def test_a_file_that_is_none_is_2(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path, text: str
    ) -> None:
        path = tmp_path / "calibration.json"
        path.write_text(text)
        result = run("scan", folder / "suspect", *images, *FAST, "--calibration", path)
        assert result.exit_code == 2
        assert str(path) in error_line(result)
        assert result.stdout == ""

    def test_a_missing_file_is_2(self, run: Run, folder: Path, images: tuple) -> None:
        args = (*images, "--calibration", folder / "nothing")
        assert "cannot be read" in error_line(run("scan", folder / "suspect", *args))

    def test_beside_a_base_it_is_the_calibration_that_counts(
        self, run: Run, folder: Path, images: tuple, says_clean: Path
    ) -> None:
        args = (folder / "suspect", *images, *FAST, "--calibration", says_clean, "--format", "json")
        alone = parse(run("scan", *args).stdout)["results"][0]
        beside = parse(run("scan", *args, "--base", folder / "base").stdout)["results"][0]
        assert beside["class_scores"] == alone["class_scores"]
        assert alone["weights"] is None
        assert beside["weights"] is not None

    def test_reference_models_with_a_base_search_in_contrast_to_it(
        self, run: Run, folder: Path, images: tuple, models: tuple, tmp_path: Path
    ) -> None:
        saved = tmp_path / "calibration.json"
        common = (folder / "suspect", *images, *FAST, "--format", "json")
        made = run(
            *("scan", *common, "--base", folder / "base", *models, "--save-calibration", saved)
        )
        first = parse(made.stdout)
        assert first["calibration"]["relative"] is True
        assert "beside one of another model" in first["results"][0]["tower"]
        used = run("scan", *common, "--calibration", saved, "--base", folder / "base")
        second = parse(used.stdout)
        assert second["results"][0]["class_p_l1"] == first["results"][0]["class_p_l1"]
        refused = run("scan", *common, "--calibration", saved)
        assert refused.exit_code != 0
        assert "made in contrast to a base" in refused.stderr

    def test_reference_models_alone_are_what_is_compared_with(
        self, run: Run, folder: Path, images: tuple, models: tuple
    ) -> None:
        result = run("scan", folder / "suspect", *images, *FAST, *models, "--format", "json")
        calibration = parse(result.stdout)["calibration"]
        assert calibration["relative"] is False
        assert len(calibration["models"]) == 2

    def test_one_reference_model_or_a_file_beside_them_is_4(
        self, run: Run, folder: Path, images: tuple, models: tuple, says_clean: Path
    ) -> None:
        args = ("scan", folder / "suspect", *images)
        assert "at least 2" in error_line(run(*args, *models[:2]))
        both = run(*args, *models, "--calibration", says_clean)
        assert both.exit_code == 4
        assert "exclude each other" in error_line(both)


class TestOutput:
    def test_file_and_report(
        self, run: Run, folder: Path, images: tuple, says_backdoored: Path, tmp_path: Path
    ) -> None:
        output, report = tmp_path / "new" / "result.json", tmp_path / "report.html"
        result = run(
            *("scan", folder / "suspect", *images, *FAST, "--calibration", says_backdoored),
            *("--format", "json", "--output", output, "--report", report),
        )
        assert result.exit_code == 1
        assert result.stdout == ""
        assert parse(output.read_text())["exit_code"] == 1
        page = report.read_text()
        assert page.count("data:image/png;base64,") == 3
        assert "backdoored" in page

    def test_text_file(
        self, run: Run, folder: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "result.txt"
        args = (*images, *FAST, "--calibration", says_clean, "--output", output)
        assert run("scan", folder / "suspect", *args).exit_code == 0
        assert output.read_text().startswith("pydetox scan\n")

    def test_the_same_file_twice_is_4(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        args = (*images, "--output", tmp_path / "x", "--report", tmp_path / "." / "x")
        assert "the same file" in error_line(run("scan", folder / "suspect", *args))

    def test_names_cannot_steer_the_terminal(
        self, run: Run, folder: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        evil = tmp_path / "\x1b[31mred"
        evil.symlink_to(folder / "suspect")
        args = (*images, *FAST, "--calibration", says_clean)
        for extra in ((), ("--format", "json")):
            result = run("scan", evil, *args, *extra)
            assert result.exit_code == 0
            assert "\x1b" not in result.stdout + result.stderr

    def test_a_real_process(self, folder: Path, images: tuple, says_backdoored: Path) -> None:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pydetox", "scan", folder / "suspect", folder / "nothing"),
                *(*images, *FAST, "--calibration", says_backdoored, "--format", "json"),
                *("--threads", "1"),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert [r["verdict"] for r in parse(done.stdout)["results"]] == ["inconclusive", "error"]
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")


class TestImages:
    def test_class_names_and_templates_from_files(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
        names.write_text("cow\ncat\ndog\n")
        templates.write_text("a {c}\nthe {}\n")
        result = run(
            *("scan", folder / "suspect", *images, *FAST, "--format", "json"),
            *("--class-names", names, "--templates", templates, "--max-images", "6"),
        )
        assert parse(result.stdout)["results"][0]["class_names"] == ["cow", "cat", "dog"]
