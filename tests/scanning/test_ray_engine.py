"""A real Ray cluster of two nodes on this machine."""

import os
from pathlib import Path

import pytest

from pydetox.errors import EngineError
from pydetox.scanning.store import read_events

from .conftest import contents, scan
from .test_local_engine import Killer

pytestmark = pytest.mark.slow


def test_without_ray_it_says_what_to_install(config, registry, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(EngineError, match=r"pydetox\[ray\]"):
        scan(config(engine="ray"), registry / "models")


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed (the extra pydetox[ray])")
    from ray.cluster_utils import Cluster

    # Workers on other nodes find pydetox as this process does.
    path = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path if before is None else f"{path}{os.pathsep}{before}"
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    assert len(ray.nodes()) == 2
    yield ray
    ray.shutdown()
    cluster.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_two_nodes_agree_with_this_process_to_the_bit(cluster, registry, config, tmp_path):
    expected = contents(scan(config(), registry / "models"))
    found = scan(config(engine="ray", workers=2), registry / "models", run=tmp_path / "run")
    assert contents(found) == expected
    again = scan(config(engine="local", workers=1), registry / "models", run=tmp_path / "run")
    assert contents(again) == expected
    assert all(record.resumed for record in again.values())


def test_a_killed_actor_costs_one_attempt(cluster, registry, config, tmp_path):
    victim = str(registry / "models" / "a")
    killer = Killer("scan", victim)
    settings = config(engine="ray", workers=1)
    found = scan(settings, registry / "models", run=tmp_path, notify=killer)
    assert {record.verdict for record in found.values()} == {"clean"}
    assert contents(found) == contents(scan(config(), registry / "models"))
    died = [e for e in read_events(tmp_path) if e["event"] == "worker-died"]
    assert len(died) == 1


def test_a_timeout_ends_one_checkpoint(cluster, registry, config):
    settings = config(
        engine="ray", workers=1, steps=10_000, restarts=500, calibration=None, timeout=3
    )
    (record,) = scan(settings, registry / "models" / "a").values()
    assert record.error_kind == "timeout"
