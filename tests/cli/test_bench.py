"""`pydetox bench`: the plan that the options make, and where the results go."""

from __future__ import annotations

import json

import pytest

import pydetox.research.bench
from pydetox.research.attacks import ATTACKS
from pydetox.research.bench import Plan, summarize

from .conftest import error_line


@pytest.fixture
def asked(monkeypatch):
    """What the command asked `run` for; no model is trained."""
    calls = []

    def fake(plan, folder, *, defenses, workers, log):
        log("nothing: 0 steps")
        calls.append((plan, folder, defenses, workers))
        content = {"before": [], "rows": [], "scans": [], "xi": None, "settings": {}}
        return {**content, "plan": plan.to_dict(), "seconds": {}, "summary": summarize(content)}

    monkeypatch.setattr(pydetox.research.bench, "run", fake)
    return calls


def test_results_go_to_the_folder_and_the_figures_to_stdout(run, asked, tmp_path):
    out = tmp_path / "out"
    result = run("bench", "--quick", "--data", "digits", "--output", out, "--format", "json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == "pydetox.bench/1"
    assert document["summary"] == json.loads((out / "summary.json").read_text())
    assert "nothing: 0 steps" in result.stderr
    names = {path.name for path in out.iterdir()}
    assert names >= {"plan.json", "summary.json", "run.json", "report.html", "results.csv"}
    ((plan, folder, defenses, workers),) = asked
    assert (plan.data, plan.seeds, folder, defenses, workers) == (
        "digits", (0,), out / "cache", None, 2,
    )  # fmt: skip


def test_the_options_narrow_the_plan(run, asked, tmp_path):
    result = run(
        "bench", "--attack", "sig", "--attack", "wanet", "--defense", "PAR", "--seeds", "2",
        "--first-seed", "5", "--workers", "1",
        "--cache", tmp_path / "cache", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "| figure | value |" in result.stdout
    ((plan, folder, defenses, workers),) = asked
    assert plan.attacks == ("sig", "wanet")
    assert plan.seeds == (5, 6)
    assert (folder, defenses, workers) == (tmp_path / "cache", ("PAR",), 1)
    assert plan.device == "cpu"
    run("bench", "--seeds", "4", "--output", tmp_path / "out")
    first = Plan().seeds[0]
    assert asked[-1][0].seeds == tuple(range(first, first + 4))


def test_wrong_usage_is_told_before_any_work(run, tmp_path):
    result = run("bench", "--attack", "magic", "--output", tmp_path / "out")
    assert result.exit_code == 4
    assert ATTACKS[0] in error_line(result)
    result = run("bench", "--first-seed", "99", "--output", tmp_path / "out")
    assert result.exit_code == 4
    assert "seed 100 is kept for tuning" in error_line(result)
    result = run("bench", "--defense", "magic", "--output", tmp_path / "out")
    assert result.exit_code == 4
    assert "'magic'" in error_line(result)
    for command in ("bench", "demo"):
        result = run(command, "--device", "cuda:77", "--output", tmp_path / "none")
        assert result.exit_code == 4
        assert "device 'cuda:77'" in error_line(result)
    assert not (tmp_path / "none").exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run("bench", "--output", blocked / "out")
    assert result.exit_code == 2
