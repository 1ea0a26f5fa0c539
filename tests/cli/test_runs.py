"""`scan` with a run folder, `report` and `compare`: what the commands print and exit with."""

from __future__ import annotations

import csv
import html
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from pydetox.checkpoints import load_checkpoint
from tests.reporting.sarif_schema import validate_sarif

from .conftest import FAST, FAST_REFERENCES, TINY, Run, error_line

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "scan.schema.json"


def parse(text: str) -> dict:
    """Read a document that has to be as its schema says."""
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads(text)
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(content, schema)
    return content


@pytest.fixture
def models(folder: Path, tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for name in ("base", "suspect"):
        shutil.copytree(folder / name, root / name)
    (root / "broken.pt").write_bytes(b"PK\x03\x04no")
    (root / "notes.md").touch()
    return root


def common(images: tuple, calibration: Path, *more: object) -> tuple:
    return (*images, *FAST, "--calibration", calibration, "--engine", "inline", *more)


class TestRun:
    def test_report_says_what_scan_said(
        self, run: Run, models: Path, images: tuple, says_backdoored: Path, tmp_path: Path
    ) -> None:
        args = common(images, says_backdoored, "--run", tmp_path / "run")
        first = run("scan", models, *args, "--format", "json")
        assert first.exit_code == 2
        assert "broken.pt" in error_line(first)
        shown = run("report", tmp_path / "run", "--format", "json")
        assert shown.exit_code == 2
        scanned, reported = parse(first.stdout), parse(shown.stdout)
        assert reported["results"] == scanned["results"]
        lines = run("report", tmp_path / "run", "--format", "jsonl").stdout.splitlines()
        assert [json.loads(line) for line in lines] == reported["results"]
        output = tmp_path / "table.csv"
        assert run("report", tmp_path / "run", "--format", "csv", "--output", output).stdout == ""
        rows = list(csv.DictReader(output.read_text().splitlines()))
        for key in ("name", "verdict", "reason"):
            assert [row[key] for row in rows] == [one[key] for one in reported["results"]]
        sizes = [one.get("p_l1") for one in reported["results"]]
        seconds = [(one["seconds"] or {}).get("total") for one in reported["results"]]
        assert [row["seconds"] for row in rows] == ["" if s is None else str(s) for s in seconds]
        assert [row["p_l1"] for row in rows] == ["" if one is None else str(one) for one in sizes]
        assert reported["counts"] == {
            "backdoored": 2,
            "suspicious": 0,
            "error": 1,
            "inconclusive": 0,
            "skipped": 0,
            "clean": 0,
        }
        passed = {Path(one["name"]).name for one in reported["ignored"]}
        assert passed == {"notes.md", "open_clip_config.json", "README.md"} & passed | {"notes.md"}
        again = run("scan", models, *args, "--format", "json")
        assert again.exit_code == 2
        assert all(one["resumed"] for one in json.loads(again.stdout)["results"] if one["sha256"])

    def test_another_configuration_is_4(
        self, run: Run, models: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        args = (*images, *FAST, "--run", tmp_path / "run", "--no-inversion", "--engine", "inline")
        assert run("scan", models / "base", *args).exit_code == 2
        result = run("scan", models / "base", *args, "--seed", "3")
        assert result.exit_code == 4
        assert "seed was 0 and is 3" in error_line(result)

    def test_html_holds_pictures_and_escapes(
        self, run: Run, models: Path, images: tuple, says_backdoored: Path, tmp_path: Path
    ) -> None:
        evil = models / "<script>alert(1)\x1b[31m"
        (models / "suspect").rename(evil)
        args = common(images, says_backdoored, "--run", tmp_path / "run")
        page = run("scan", evil, *args, "--format", "html").stdout
        assert page.startswith("<!doctype html>")
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert "\x1b" not in page
        assert page.count("data:image/png;base64,") == 3
        assert run("report", tmp_path / "run", "--format", "html").stdout == page
        for format_ in ("text", "json", "sarif"):
            assert "\x1b" not in run("report", tmp_path / "run", "--format", format_).stdout

    def test_no_run_is_2(self, run: Run, tmp_path: Path) -> None:
        result = run("report", tmp_path)
        assert result.exit_code == 2
        assert "config.json" in error_line(result)

    def test_fail_on(
        self, run: Run, models: Path, images: tuple, tmp_path: Path, folder: Path
    ) -> None:
        args = (*images, *FAST, "--run", tmp_path / "run", "--no-inversion", "--engine", "inline")
        run("scan", models / "base", *args)
        (part,) = (tmp_path / "run" / "parts").glob("*.json")
        content = json.loads(part.read_text())
        part.write_text(json.dumps(content | {"verdict": "suspicious"}))
        assert run("report", tmp_path / "run").exit_code == 1
        assert run("report", tmp_path / "run", "--fail-on", "backdoored").exit_code == 0
        part.write_text(json.dumps(content | {"verdict": "backdoored"}))
        assert run("report", tmp_path / "run", "--fail-on", "backdoored").exit_code == 1

    def test_what_was_not_reached_is_not_clean(
        self, run: Run, models: Path, images: tuple, tmp_path: Path
    ) -> None:
        args = (*images, *FAST, "--run", tmp_path / "run", "--no-inversion", "--engine", "inline")
        run("scan", models / "base", models / "suspect", *args)
        log = tmp_path / "run" / "events.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        last = next(i for i, line in reversed(list(enumerate(lines))) if '"record"' in line)
        log.write_text("".join(lines[:last]))
        result = run("report", tmp_path / "run", "--format", "json")
        assert result.exit_code == 2
        assert parse(result.stdout)["not_reached"] == [str(models / "suspect")]
        assert "not reached" in run("report", tmp_path / "run").stdout
        assert "not reached" in run("report", tmp_path / "run", "--format", "sarif").stdout


class TestSchema:
    def test_with_a_base(self, run: Run, models: Path, images: tuple, tmp_path: Path) -> None:
        args = (*images, *FAST, "--engine", "inline", "--format", "json", "--run", tmp_path / "run")
        base = ("--base", models / "base", *FAST_REFERENCES)
        content = parse(run("scan", models, *args, *base).stdout)
        assert content["calibration"]["models"][0] == str(models / "base")
        assert parse(run("report", tmp_path / "run", "--format", "json").stdout) == content

    def test_what_it_refuses(self, run: Run, models: Path, images: tuple) -> None:
        import jsonschema

        args = (*images, *FAST, "--engine", "inline", "--format", "json", "--no-inversion")
        content = parse(run("scan", models / "base", *args).stdout)
        for change in ({"verdict": "clean"}, {"verdict": "fine"}, {"surprise": 1}, {"key": "x"}):
            bad = {**content, "results": [{**content["results"][0], **change}]}
            with pytest.raises(jsonschema.ValidationError):
                parse(json.dumps(bad))


class TestCompare:
    def test_changes(self, run: Run, models: Path, images: tuple, tmp_path: Path) -> None:
        args = (*images, *FAST, "--no-inversion", "--engine", "inline")
        run("scan", models / "base", models / "suspect", *args, "--run", tmp_path / "a")
        run("scan", models / "base", *args, "--run", tmp_path / "b")
        same = run("compare", tmp_path / "a", tmp_path / "a")
        assert (same.exit_code, same.stdout) == (0, "0 changed, 2 the same\n")
        result = run("compare", tmp_path / "a", tmp_path / "b", "--format", "json")
        assert result.exit_code == 1
        (change,) = json.loads(result.stdout)["changes"]
        assert (change["kind"], change["name"]) == ("gone", str(models / "suspect"))
        shown = run("compare", tmp_path / "b", tmp_path / "a").stdout
        assert f"new: {models / 'suspect'}: not there -> inconclusive" in shown


class TestTargets:
    def test_dry_run_lists_and_scans_nothing(
        self, run: Run, models: Path, images: tuple, tmp_path: Path
    ) -> None:
        result = run("scan", models, *images, "--dry-run", "--run", tmp_path / "run")
        assert result.exit_code == 0
        *_, counted, estimated = result.stdout.splitlines()
        assert counted.startswith("3 to scan, ")
        assert estimated.startswith("at most about ")
        assert f"timed on {models / 'base'}" in estimated
        assert "notes.md: is no weights file by its name" in result.stdout
        assert not (tmp_path / "run").exists()
        document = json.loads(run("scan", models, *images, "--dry-run", "--format", "json").stdout)
        assert [Path(one["name"]).name for one in document["targets"]] == [
            "broken.pt",
            "base",
            "suspect",
        ]
        estimate = document["estimate"]
        assert estimate["workers"] >= 1
        # broken.pt has an estimate by its size, too.
        assert estimate["seconds"] > 150 * estimate["seconds_per_step"] / estimate["workers"]
        assert estimate["memory"] > 2**30

    def test_a_dry_run_without_a_readable_checkpoint_says_that(
        self, run: Run, models: Path, images: tuple
    ) -> None:
        result = run("scan", models / "broken.pt", *images, "--dry-run")
        assert result.exit_code == 0
        assert "how long it takes is not known" in result.stdout
        args = ("scan", models / "broken.pt", *images, "--dry-run", "--format", "json")
        assert json.loads(run(*args).stdout)["estimate"] is None

    def test_a_dry_run_without_searches_times_the_reading(
        self, run: Run, models: Path, images: tuple
    ) -> None:
        args = ("--dry-run", "--no-inversion", "--format", "json")
        document = json.loads(run("scan", models, *images, *args).stdout)
        assert document["estimate"]["seconds_per_step"] == 0
        assert document["estimate"]["seconds"] > 0

    def test_shards_make_up_the_whole(self, run: Run, models: Path, images: tuple) -> None:
        names = []
        for shard in ("1/2", "2/2"):
            args = ("--dry-run", "--format", "json", "--shard", shard)
            document = json.loads(run("scan", models, *images, *args).stdout)
            names += [one["name"] for one in document["targets"]]
            assert len(document["targets"]) + document["other_shards"] == 3
        assert len(set(names)) == 3

    def test_nothing_to_scan_is_3(self, run: Run, images: tuple, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        result = run("scan", tmp_path / "empty", *images)
        assert result.exit_code == 3
        assert "nothing to scan" in error_line(result)

    def test_too_large_is_skipped_and_2(
        self, run: Run, models: Path, images: tuple, says_clean: Path
    ) -> None:
        args = common(images, says_clean, "--max-size", "1K")
        result = run("scan", models / "base", *args)
        assert result.exit_code == 2
        assert "not scanned" in result.stdout
        assert "(--max-size)" in result.stdout

    @pytest.mark.parametrize(
        "args",
        [
            ("--max-size", "big"),
            ("--max-size", "0"),
            ("--max-memory", "1M"),
            ("--shard", "0/2"),
            ("--shard", "3/2"),
            ("--shard", "x"),
            ("--timeout", "0"),
            ("--engine", "magic"),
            ("--engine", "inline", "--timeout", "5"),
            ("--address", "auto"),
            ("--known-vector", "v"),
            ("--config", "nothing.json"),
        ],
    )
    def test_usage(self, run: Run, folder: Path, images: tuple, args: tuple) -> None:
        result = run("scan", folder / "base", *images, *args)
        assert result.exit_code == 4
        assert result.stdout == ""
        error_line(result)


class TestConfigFile:
    def test_gives_defaults_that_the_command_line_overrides(
        self, run: Run, folder: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "scan.json"
        content = {"images": images[1], "steps": 3, "batch_size": 1, "seed": 5, "format": "json"}
        path.write_text(json.dumps(content | {"calibration": str(says_clean)}))
        result = run("scan", folder / "suspect", "--config", path)
        assert json.loads(result.stdout)["seed"] == 5
        result = run("scan", folder / "suspect", "--config", path, "--seed", "6")
        assert json.loads(result.stdout)["seed"] == 6

    @pytest.mark.parametrize("content", [{"step": 3}, {"steps": "many"}, {"steps": 0}, []])
    def test_is_checked(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path, content: object
    ) -> None:
        path = tmp_path / "scan.json"
        path.write_text(json.dumps(content))
        result = run("scan", folder / "suspect", *images, "--config", path)
        assert result.exit_code == 4
        error_line(result)


class TestFindings:
    """What is odd about a file stands in every format, whatever the verdict."""

    @pytest.fixture
    def odd(self, models: Path) -> Path:
        """The base as a pickle that names another package, and has a second set of weights."""
        weights = load_checkpoint(models / "base").state_dict
        other = {name: tensor + 1 for name, tensor in weights.items()}
        content = {"state_dict": weights, "state_dict_ema": other, "epoch": 3}
        torch.save(content, models / "odd.pt")
        return models / "odd.pt"

    def test_in_every_format(
        self, run: Run, odd: Path, models: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        config = tmp_path / "tiny.json"
        config.write_text(json.dumps(TINY))
        args = common(images, says_clean, "--run", tmp_path / "run", "--model", config)
        said = "has other values under the same names, and another loader may take those"
        first = run("scan", odd, *args, "--format", "json", "--report", tmp_path / "report.html")
        assert first.exit_code == 2
        (found,) = parse(first.stdout)["results"]
        assert found["verdict"] == "error"  # nobody knows which weights run
        assert said in found["error"]
        (finding,) = found["findings"]
        assert finding["rule"] == "several-weights"
        assert said in finding["message"]
        shown = {
            format_: run("report", tmp_path / "run", "--format", format_)
            for format_ in ("text", "json", "sarif", "html")
        }
        assert {result.exit_code for result in shown.values()} == {2}
        pages = {name: result.stdout for name, result in shown.items()}
        assert f"finding (several-weights): {finding['message']}" in " ".join(pages["text"].split())
        assert parse(pages["json"])["results"] == [found]
        log = json.loads(pages["sarif"])
        validate_sarif(log)
        (result,) = log["runs"][0]["results"]
        assert (result["ruleId"], result["level"]) == ("PYDETOX004", "warning")
        assert result["message"]["text"] == f"{odd}: {finding['message']}"
        for page in (pages["html"], (tmp_path / "report.html").read_text()):
            assert "Finding 1 (several-weights)" in page
            assert html.escape(finding["message"]) in page

    def test_a_scan_of_the_weights_that_are_named(
        self, run: Run, odd: Path, models: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        config = tmp_path / "tiny.json"
        config.write_text(json.dumps(TINY))
        args = common(images, says_clean, "--model", config, "--format", "json")
        args = (*args, "--run", tmp_path / "run")
        (plain,) = parse(run("scan", models / "base", *args[:-2]).stdout)["results"]
        result = run("scan", odd, *args, "--weights-key", "state_dict")
        assert result.exit_code == 0
        (found,) = parse(result.stdout)["results"]
        assert found["class_p_l1"] == plain["class_p_l1"]
        (finding,) = found["findings"]
        assert finding["rule"] == "chosen-weights"
        assert "'state_dict' is read, as it was asked for" in finding["message"]
        other = run("scan", odd, *args[:-2], "--weights-key", "state_dict_ema")
        (found,) = parse(other.stdout)["results"]
        assert found["class_p_l1"] != plain["class_p_l1"]
        # A run belongs to one choice.
        result = run("scan", odd, *args, "--weights-key", "state_dict_ema")
        assert result.exit_code == 4
        assert "weights_key was 'state_dict' and is 'state_dict_ema'" in error_line(result)
        result = run("scan", odd, *args[:-2], "--weights-key", "x")
        assert result.exit_code == 2
        assert "has no tensors under 'x'; there are tensors under" in error_line(result)

    def test_the_other_commands_take_the_key_of_the_suspect(
        self, run: Run, odd: Path, images: tuple, tmp_path: Path
    ) -> None:
        config = tmp_path / "tiny.json"
        config.write_text(json.dumps(TINY))
        args = ("--model", config, *images, "--format", "json")
        refused = run("eval", odd, *args)
        assert refused.exit_code == 2
        message = "name the one that you mean with --weights-key, such as state_dict"
        assert message in error_line(refused)
        for key in ("state_dict", "state_dict_ema"):
            assert run("eval", odd, *args, "--weights-key", key).exit_code == 0

    def test_of_a_file_that_is_scanned(
        self, run: Run, odd: Path, images: tuple, says_clean: Path, tmp_path: Path
    ) -> None:
        """A finding that is no ambiguity is no part of the verdict."""
        weights = torch.load(odd, weights_only=True)["state_dict"]
        torch.save({"state_dict": {**weights, "visual.proj": weights["visual.proj"]}}, odd)
        raw = zipfile.ZipFile(odd, "a")
        raw.writestr("odd/install.sh", b"#!/bin/sh")
        raw.close()
        config = tmp_path / "tiny.json"
        config.write_text(json.dumps(TINY))
        args = common(images, says_clean, "--model", config)
        results = {
            format_: run("scan", odd, *args, "--format", format_)
            for format_ in ("text", "json", "sarif", "html")
        }
        assert {result.exit_code for result in results.values()} == {0}
        for result in results.values():
            assert "odd/install.sh" in result.stdout
        validate_sarif(json.loads(results["sarif"].stdout))
