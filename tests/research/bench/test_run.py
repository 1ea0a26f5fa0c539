"""A whole small run: every step, from the cache the second time, the same for any workers."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pydetox
from pydetox.detect.configuration import ScanConfig
from pydetox.errors import DataError, UsageError
from pydetox.evaluation import Evaluation
from pydetox.inversion import InversionConfig
from pydetox.repair.task_vectors import TaskVector
from pydetox.research.attacks import ATTACKS
from pydetox.research.bench import Plan, quick_plan, run, write_outputs
from pydetox.research.bench import lab as lab_module
from pydetox.research.bench.cache import Cache, code_digest, data_digest, defense_code, key_of
from pydetox.research.bench.lab import Lab
from pydetox.research.bench.models import Suspect
from pydetox.research.defenses import DEFENSES as DEFENSES_ALL
from pydetox.research.defenses import FineTuning, PydetoxKnown, PydetoxUnknown
from pydetox.training import TrainConfig
from tests.cli.conftest import TINY
from tests.mini import mini_images
from tests.test_training import coloured

DEFENSES = [PydetoxKnown().name, PydetoxUnknown().name, FineTuning().name]


def small_plan(folder: Path, **changes) -> Plan:
    images = coloured(240)
    path = folder / "images.npz"
    np.savez(
        path,
        images=images.images.numpy(),
        labels=images.labels.numpy(),
        class_names=np.array(images.class_names),
    )
    given = {
        "data": str(path),
        "attacks": ("badnets", "two-backdoors"),
        "rates": dict.fromkeys(ATTACKS, 0.2),
        "seeds": (0,),
        "clean_models": 1,
        "tuning_attacks": (),
        "model_config": TINY,
        "base_training": TrainConfig(30, 3e-3, train_text=True),
        "fine_tuning": TrainConfig(30, 2e-3),
        "scan": ScanConfig(
            inversion=InversionConfig(steps=5, batch_size=4),
            references=2,
            reference_training=TrainConfig(1, 1e-3),
        ),
        "xi_points": 3,
    }
    return Plan(**{**given, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    plan = small_plan(folder)
    return plan, folder / "cache", run(plan, folder / "cache", defenses=DEFENSES, workers=1)


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def test_a_run_measures_every_victim_with_every_defence(finished):
    plan, _, result = finished
    before = {row["suspect"]: row for row in result["before"]}
    assert list(before) == ["badnets-seed0", "two-backdoors-seed0", "clean-0-seed0"]
    assert before["badnets-seed0"]["counts"]
    assert before["badnets-seed0"]["asr"][0] > 0.8
    assert before["clean-0-seed0"]["asr"] == [None]
    counted = [name for name, row in before.items() if row["counts"]]
    assert [(r["defense"], r["suspect"]) for r in result["rows"]] == [
        (d, s) for d in DEFENSES for s in counted
    ]
    for row in result["rows"]:
        assert (row["images"], row["labels"]) == (36, 36)
        assert row["n_attack"][0] < row["n_clean"] == 60
        assert row["ca_ci"][0] <= row["ca"] <= row["ca_ci"][1]
        assert ("relapse" in row) == (row["defense"] != FineTuning().name)
        assert ("path" in row) == (row["defense"] != FineTuning().name)
    assert {s["suspect"] for s in result["scans"]} == {*counted, "clean-0-seed0"}
    assert all(set(s["class_scores"]) == {"patch", "blend"} for s in result["scans"])
    assert result["summary"]["known.asr_mean"] < 0.5
    assert len(result["xi"]["backdoor"]["error"]) == plan.xi_points


def test_a_second_run_trains_nothing_and_says_the_same(finished, monkeypatch):
    plan, cache, result = finished

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(lab_module, "train_on_prompts", refuse)
    again = run(plan, cache, defenses=DEFENSES, workers=1)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in result.items() if k != "seconds"
    }
    # A change in the plan changes what depends on it, and only that.
    with pytest.raises(AssertionError, match="trained again"):
        run(replace(plan, fine_tuning=TrainConfig(1, 1e-3)), cache, defenses=DEFENSES, workers=1)


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(finished, tmp_path):
    plan, _, result = finished
    again = run(plan, tmp_path, defenses=DEFENSES, workers=2)
    assert without_seconds(again["rows"]) == without_seconds(result["rows"])
    assert without_seconds(again["scans"]) == without_seconds(result["scans"])
    assert again["summary"] == result["summary"]


@pytest.mark.slow
def test_settings_are_chosen_on_models_of_their_own(finished):
    plan, cache, _ = finished
    tuned = replace(plan, attacks=("badnets",), tuning_attacks=("badnets",))
    result = run(tuned, cache, defenses=[FineTuning().name], workers=1)
    found = result["settings"][FineTuning().name]
    assert [one["setting"] for one in found["tried"]] == [0, 1, 2, 3]
    good = [one for one in found["tried"] if one["ca_kept"] >= tuned.least_ca_kept]
    if good:
        assert found["setting"] == min(good, key=lambda o: (o["asr"], o["setting"]))["setting"]
    assert all(row["seed"] != tuned.tuning_seed for row in result["rows"])
    assert all(row["setting"] == found["setting"] for row in result["rows"])


def test_what_is_written_is_whole_and_readable(finished, tmp_path):
    result = finished[2]
    write_outputs(tmp_path, result)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == result["summary"]
    files = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert len(files) == len(result["before"]) + len(result["rows"])
    assert "badnets-seed0_pydetox-known-trigger.json" in files
    with (tmp_path / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(files)
    page = (tmp_path / "report.html").read_text()
    for heading in ("CA and ASR over α", "Disentanglement error ξ", "Detection", "Settings"):
        assert heading in page
    assert "| Defence | badnets |" in (tmp_path / "results.md").read_text()


def test_the_parts_of_the_data_share_no_image(tmp_path):
    lab = Lab(small_plan(tmp_path), 0, tmp_path)
    parts = [lab.splits.attacker, lab.splits.defender, lab.splits.validation, lab.splits.test]
    seen = [{x.numpy().tobytes() for x in part.images} for part in parts]
    for k, one in enumerate(seen):
        for other in seen[k + 1 :]:
            assert not one & other
    assert [len(p) for p in parts] == [120, 36, 24, 60]


def test_references_have_images_of_their_own(tmp_path):
    lab = Lab(small_plan(tmp_path, fine_tuning_images=60), 0, tmp_path)
    whole = {x.numpy().tobytes() for x in lab.splits.attacker.images}
    sets = [{x.numpy().tobytes() for x in lab._reference_images(k).images} for k in range(3)]
    assert [len(one) for one in sets] == [60, 60, 60]
    assert all(one < whole for one in sets)
    assert sets[0] != sets[1] != sets[2] != sets[0]
    again = Lab(small_plan(tmp_path, fine_tuning_images=60), 0, tmp_path)._reference_images(1)
    assert {x.numpy().tobytes() for x in again.images} == sets[1]


def test_the_way_to_a_repair_leads_there(tmp_path):
    lab = Lab(small_plan(tmp_path), 0, tmp_path)
    victim = Suspect(0, "badnets")
    model = lab.model(victim)
    change = {"visual.proj": torch.ones_like(model.visual.proj.detach())}
    steps = [(TaskVector(change), alpha) for alpha in (0.5, 0.25)]
    measured = []

    def note(candidate, *_):
        weights = (
            candidate.clip.state_dict()["visual.proj"] - model.clip.state_dict()["visual.proj"]
        )
        measured.append(-float(weights.mean()))
        return [Evaluation(0.5, (0.4, 0.6), (0.5,), 10)]

    lab.measure = note
    points = lab._path(victim, model, steps, lab.splits.test)
    assert measured == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5625, 0.625, 0.6875], abs=1e-6)
    assert points == [{"ca": 0.5, "asr": [None]}] * 7
    assert lab._path(victim, model, [], lab.splits.test) == []


def test_keys_depend_on_everything_that_decides_a_model(tmp_path):
    plan = small_plan(tmp_path)
    victim = Suspect(0, "badnets")
    key = Lab(plan, 0, tmp_path).key(victim)
    assert key == Lab(plan, 0, tmp_path / "elsewhere").key(victim)
    for other in (
        Lab(plan, 1, tmp_path).key(victim),
        Lab(plan, 0, tmp_path).key(Suspect(0, "blended")),
        Lab(plan, 0, tmp_path).key(Suspect(0, None, 1)),
        Lab(replace(plan, rates={"badnets": 0.1}), 0, tmp_path).key(victim),
        Lab(replace(plan, fine_tuning=TrainConfig(2, 2e-3)), 0, tmp_path).key(victim),
        Lab(replace(plan, base_training=TrainConfig(2, 2e-3)), 0, tmp_path).key(victim),
    ):
        assert other != key
    one, two = mini_images(4), mini_images(4, seed=1)
    assert data_digest(one) != data_digest(two)
    assert data_digest(one) == data_digest(mini_images(4))
    assert code_digest(("research/attacks",)) != code_digest(("research/attacks", "data"))
    assert key_of("a", {"x": 1}) != key_of("a", {"x": 2})


def test_a_result_depends_on_its_own_method_alone():
    code = {one.name: defense_code(one) for one in DEFENSES_ALL}
    for name in ("fine-tuning", "CleanCLIP", "PAR", "fine-pruning", "gradient ascent"):
        assert "repair" not in code[name]
        assert "inversion" not in code[name]
    assert "research/defenses/fine_tuning.py" in code["PAR"]
    assert "repair" in code["plain TBAR"]
    assert "inversion" not in code["pydetox, known trigger"]
    assert {"inversion", "session.py", "repair"} <= set(code["pydetox, unknown trigger"])
    root = Path(pydetox.__file__).parent
    assert all((root / part).exists() for parts in code.values() for part in parts)


def test_the_cache_gives_back_what_it_was_given(tmp_path):
    cache = Cache(tmp_path)
    assert cache.weights("k") is None
    assert cache.document("k") is None
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3)}
    cache.keep_weights("k", tensors)
    found = cache.weights("k")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert cache.keep_document("k", {"x": float("nan"), "y": (1, 2)}) == {"x": None, "y": [1, 2]}
    assert cache.document("k") == {"x": None, "y": [1, 2]}


def test_plans_that_cannot_be_meant_are_refused(tmp_path):
    for wrong in (
        {"attacks": ("magic",)},
        {"attacks": ()},
        {"seeds": ()},
        {"seeds": (100,)},
        {"clean_models": 0},
        {"xi_points": 1},
    ):
        with pytest.raises(UsageError):
            Plan(**wrong)
    with pytest.raises(UsageError, match="expected one of pydetox, known"):
        run(small_plan(tmp_path), tmp_path, defenses=["magic"], workers=1)
    images = coloured(20)
    plan = replace(small_plan(tmp_path), data=str(tmp_path / "bare.npz"))
    np.savez(tmp_path / "bare.npz", images=images.images.numpy())
    with pytest.raises(DataError, match="needs labels"):
        _ = Lab(plan, 0, tmp_path).splits


def test_the_plans_of_the_command_are_the_stated_ones():
    plan = Plan()
    assert plan.attacks == ATTACKS
    assert len(plan.seeds) * plan.clean_models >= 16
    assert len(plan.seeds) * len(plan.attacks) >= 16
    assert all(0.005 <= plan.rate(attack) <= 0.05 for attack in plan.attacks)
    assert quick_plan("digits").data == "digits"


def test_workers_end_when_their_driver_is_killed():
    worker = (
        "import os, threading, time; from pydetox.research.bench.runner import _follow; "
        "threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start(); "
        "print(os.getpid(), flush=True); time.sleep(120)"
    )
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])",
            worker,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        # Where nobody reaps it, a process that has ended is still there, as a zombie.
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.2)
    else:
        os.kill(pid, 9)
        pytest.fail("the worker goes on without its driver")
    driver.stdout.close()
