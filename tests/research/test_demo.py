import json

import pytest

from pydetox.research.demo import run_demo


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    result = run_demo(tmp_path / "demo", seed=0)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["clean"]["verdict"] == "clean"
    assert summary["backdoored"]["verdict"] == "backdoored"
    assert summary["backdoored"]["target_inferred"] == summary["backdoored"]["target_true"]
    assert summary["before"]["asr"] >= 0.95
    assert summary["after"]["asr"] <= 0.05
    assert summary["after"]["ca"] >= 0.95 * summary["before"]["ca"]
    assert summary["rescan"]["verdict"] == "clean"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png") == 5
    assert "scaling coefficient" in page
    assert (tmp_path / "demo" / "checkpoints" / "repaired" / "README.md").is_file()
