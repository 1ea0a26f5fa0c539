"""Real processes: that they agree with this one, and what happens when they die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pydetox.errors import EngineError
from pydetox.scanning import Scanner
from pydetox.scanning.runs import load_run
from pydetox.scanning.store import read_events

from .conftest import contents, scan


class Killer:
    """Kills a worker when it begins with something, a number of times."""

    def __init__(self, kind: str, name: str, times: int = 1) -> None:
        self.kind, self.name, self.times = kind, name, times
        self.pids: dict[int, int] = {}
        self.events: list[str] = []

    def __call__(self, event: str, **particulars) -> None:
        self.events.append(event)
        if event == "worker-started":
            self.pids[particulars["worker"]] = particulars["pid"]
        wanted = event == "started" and particulars["kind"] == self.kind
        if wanted and particulars["name"] == self.name and self.times:
            self.times -= 1
            os.kill(self.pids[particulars["worker"]], signal.SIGKILL)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_one_and_two_workers_agree_with_this_process(registry, config, tmp_path):
    expected = contents(scan(config(), registry / "models"))
    one = scan(config(engine="local", workers=1), registry / "models", run=tmp_path / "one")
    two = scan(config(engine="local", workers=2), registry / "models", run=tmp_path / "two")
    assert contents(one) == expected
    assert contents(two) == expected
    for key in {str(record.key) for record in one.values()}:
        files = [
            (tmp_path / run / "triggers" / f"{key}.trigger.safetensors").read_bytes()
            for run in ("one", "two")
        ]
        assert files[0] == files[1]


def test_a_killed_worker_costs_one_attempt(registry, config, tmp_path):
    expected = contents(scan(config(), registry / "models"))
    victim = str(registry / "models" / "a")
    killer = Killer("scan", victim)
    settings = config(engine="local", workers=1)
    found = scan(settings, registry / "models", run=tmp_path, notify=killer)
    assert contents(found) == expected
    assert "worker-died" in killer.events
    assert {name: r.attempts for name, r in found.items() if r.attempts != 1} in (
        {},  # it was done before the signal came
        {victim: 2},
    )


def test_a_checkpoint_that_kills_its_worker_twice_is_an_error(registry, config, tmp_path):
    victim = str(registry / "models" / "a")
    killer = Killer("scan", victim, times=2)
    settings = config(engine="local", workers=2, steps=40)
    found = scan(settings, registry / "models", run=tmp_path, notify=killer)
    assert found[victim].verdict == "error"
    assert found[victim].error_kind == "crash"
    assert "SIGKILL" in found[victim].reason
    others = [r.reason for r in found.values() if r.verdict == "error" and r.name != victim]
    assert others == []


def test_a_survey_that_dies_is_an_error_too(registry, config):
    victim = str(registry / "models" / "c")
    killer = Killer("survey", victim, times=2)
    found = scan(config(engine="local", workers=1, steps=1), registry / "models", notify=killer)
    # A tiny file is surveyed before the signal arrives, now and then.
    assert found[victim].verdict in ("error", "inconclusive")
    assert sum(record.verdict == "error" for record in found.values()) <= 1


def test_a_timeout_ends_one_checkpoint(registry, config, tmp_path):
    settings = config(
        engine="local", workers=1, steps=10_000, restarts=500, calibration=None, timeout=2
    )
    targets = [registry / "models" / "a", registry / "models" / "b"]
    found = scan(settings, *targets, run=tmp_path)
    assert [r.verdict for r in found.values()] == ["error", "error"]
    assert {r.error_kind for r in found.values()} == {"timeout"}
    assert "timeout=" in found[str(targets[0])].reason
    pids = [e["pid"] for e in read_events(tmp_path) if e["event"] == "worker-started"]
    assert len(pids) >= 2
    assert all(gone(pid) for pid in pids)


def test_a_worker_that_cannot_start_says_why(registry, config, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\n")
    settings = config(engine="local", class_names=str(names))

    def remove(event, **_):
        if event == "stage":
            names.unlink(missing_ok=True)

    with pytest.raises(EngineError, match=r"names\.txt"):
        scan(settings, registry / "models", notify=remove)


def test_workers_end_with_the_iterator(registry, config, tmp_path):
    settings = config(engine="local", workers=2)
    records = Scanner(settings, run=tmp_path).scan([registry / "models"])
    next(records)
    records.close()
    pids = [e["pid"] for e in read_events(tmp_path) if e["event"] == "worker-started"]
    assert pids
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_ends_can_be_resumed(registry, config, tmp_path, how):
    settings = config(engine="local", workers=2, steps=60)
    expected = contents(scan(config(steps=60), registry / "models"))
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "pydetox", "scan", str(registry / "models"), "--run", str(run)),
        *("--images", settings.images, "--steps", "60", "--batch-size", "1", "--threads", "1"),
        *("--calibration", str(settings.calibration), "--workers", "2"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 600  # on a busy machine: three processes import torch
        while not any((run / "parts").glob("*.json")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.strip() == "error: interrupted"
    assert stdout == ""
    pids = [e["pid"] for e in read_events(run) if e["event"] == "worker-started"]
    assert pids
    assert all(gone(pid) for pid in pids)
    rest = subprocess.run(command, capture_output=True, text=True)
    found = {record.name: record for record in load_run(run).records}
    verdicts = {record.verdict for record in found.values()}
    code = 2 if "inconclusive" in verdicts else 1 if verdicts & {"backdoored", "suspicious"} else 0
    assert rest.returncode == code

    def without_keys(records: dict) -> dict:
        return {name: {k: v for k, v in c.items() if k != "key"} for name, c in records.items()}

    assert without_keys(contents(found)) == without_keys(expected)
