"""A real Ray cluster of two nodes on this machine, and a stand-in for clusters it cannot have."""

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from pydetox.errors import EngineError
from pydetox.scanning.engines.ray import RayEngine, check_address
from pydetox.scanning.store import read_events
from pydetox.scanning.tasks import Task

from .conftest import contents, scan
from .test_local_engine import Killer


def test_without_ray_it_says_what_to_install(config, registry, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(EngineError, match=r"pydetox\[ray\]"):
        scan(config(engine="ray"), registry / "models")


class StandInForRay:
    """What the engine uses of Ray, for clusters and deaths that this machine cannot have.

    machines: (CPUs, GPUs) of each. answer: what `run` returns or raises for a task's name. starts:
    how many actors find room, None for all.
    """

    def __init__(self, machines, answer=None, starts=None) -> None:
        self.exceptions = pytest.importorskip("ray").exceptions
        self.machines, self.answer, self.starts = machines, answer, starts
        self.hired: list[dict] = []
        self.killed = 0

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict]:
        return [
            {"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}
            for cpus, gpus in self.machines
        ]

    def available_resources(self) -> dict:
        return {"CPU": 1.0}

    def remote(self, **needs):
        ray = self

        class Method:
            def __init__(self, call) -> None:
                self.remote = call
                self.options = lambda **_: self

        class Handle:
            def __init__(self) -> None:
                ray.hired.append(needs)
                number = len(ray.hired)
                room = ray.starts is None or number <= ray.starts
                self.ready = Method(lambda: ("pid", number) if room else ("never", number))
                self.run = Method(lambda text: ("run", text))
                self.prepare = Method(lambda text: ("prepare", text))

        return lambda _: Method(lambda *_: Handle())

    def wait(self, references, timeout):
        done = [one for one in references if one[0] != "never"]
        if not done:
            time.sleep(min(timeout, 0.05))
        return done[:1], []

    def get(self, reference):
        kind, value = reference
        if kind == "pid":
            return value
        found = self.answer(json.loads(value)["name"])
        if isinstance(found, Exception):
            raise found
        return json.dumps(found)

    def kill(self, handle) -> None:
        self.killed += 1


def engine(monkeypatch, config, ray: StandInForRay, targets: int = 10, **changes) -> RayEngine:
    monkeypatch.setitem(sys.modules, "ray", ray)
    events: list = []
    made = RayEngine(
        config(engine="ray", **{"threads": None, **changes}),
        targets,
        lambda event, **more: events.append((event, more)),
    )
    made.events = events
    return made


def tasks(*names: str) -> list[Task]:
    return [Task(number, "survey", name) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("machines", "changes", "message"),
    [
        ([(4, 0)], {"workers": 8, "threads": 1}, r"8 workers of 1 CPU each, .* room for 4"),
        ([(4, 0)], {"threads": 8}, r"1 worker of 8 CPUs each, .* room for 0"),
        ([(4, 0), (4, 0)], {"threads": 6}, r"room for 0: 2 machines with 4 \+ 4 CPUs"),
        ([(8, 2)], {"device": "cuda", "workers": 3}, r"3 workers .* and 1 GPU each, .* room for 2"),
        ([(8, 0)], {"device": "cuda"}, r"room for 0: 1 machine with 8 CPUs and 0 GPUs"),
    ],
)
def test_workers_that_never_fit_are_refused_at_once(
    monkeypatch, config, machines, changes, message
):
    with pytest.raises(EngineError, match=message):
        engine(monkeypatch, config, StandInForRay(machines), **changes)


@pytest.mark.parametrize(
    ("machines", "changes", "targets", "expected"),
    [
        ([(8, 0)], {}, 10, (2, 4)),
        ([(8, 0)], {}, 1, (1, 4)),
        ([(8, 4)], {"device": "cuda"}, 10, (4, 2)),
        # Three workers of 8 // 3 CPUs fit on one machine of 8, not on two of 4.
        ([(8, 0)], {"workers": 3}, 10, (3, 2)),
        ([(4, 0), (4, 0)], {"workers": 3}, 10, (3, 2)),
        ([(3, 0), (3, 0)], {"workers": 3}, 10, (3, 1)),
        ([(8, 2)], {"device": "cuda", "workers": 9}, 2, (2, 1)),
        ([(1, 0)], {}, 10, (1, 1)),
    ],
)
def test_what_actors_ask_for_fits_on_the_machines(
    monkeypatch, config, machines, changes, targets, expected
):
    ray = StandInForRay(machines, lambda name: {"result": {}})
    made = engine(monkeypatch, config, ray, targets, **changes)
    assert len(list(made.run(tasks(*map(str, range(targets)))))) == targets
    assert (len(ray.hired), ray.hired[0]["num_cpus"]) == expected


def test_a_worker_killed_for_memory_costs_its_checkpoint_only(monkeypatch, config):
    error = pytest.importorskip("ray").exceptions.OutOfMemoryError("killed by the monitor")
    ray = StandInForRay([(4, 0)], lambda name: error if name == "large" else {"result": {}})
    made = engine(monkeypatch, config, ray, workers=2)
    found = {outcome.task.name: outcome for outcome in made.run(tasks("a", "large", "b"))}
    assert found["a"].error is None
    assert found["b"].error is None
    assert found["large"].error == ("its worker died 2 times (last: out of memory on its machine)")
    assert found["large"].error_kind == "crash"
    assert ray.killed == 2


@pytest.mark.parametrize(
    ("name", "args"),
    [("WorkerCrashedError", ()), ("ActorDiedError", ()), ("NodeDiedError", ("x",))],
)
def test_other_deaths_cost_two_attempts(monkeypatch, config, name, args):
    error = getattr(pytest.importorskip("ray").exceptions, name)(*args)
    made = engine(monkeypatch, config, StandInForRay([(4, 0)], lambda _: error), workers=1)
    (outcome,) = made.run(tasks("a"))
    assert outcome.error == "its worker died 2 times (last: the actor died)"


def test_one_worker_that_finds_no_room_does_not_stop_the_others(monkeypatch, config):
    ray = StandInForRay([(4, 0)], lambda name: {"result": {}}, starts=1)
    made = engine(monkeypatch, config, ray, workers=2)
    assert len(list(made.run(tasks("a", "b", "c")))) == 3


def test_a_cluster_that_others_use_is_waited_for_only_so_long(monkeypatch, config):
    monkeypatch.setattr("pydetox.scanning.engines.ray.START_SECONDS", 0.2)
    made = engine(monkeypatch, config, StandInForRay([(4, 0)], starts=0), threads=4)
    with pytest.raises(EngineError, match=r"within 0.2 s: each asks for 4 CPUs.* 1 CPUs and 0 GPU"):
        list(made.run(tasks("a")))


def test_an_address_where_nothing_listens(config, registry):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(EngineError, match=f"no Ray cluster answers at {address}: .*refused"):
        scan(config(engine="ray", address=address), registry / "models")
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer(capfd, scheme):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"no Ray cluster answers at") as caught:
            check_address(address, 8)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


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


@pytest.mark.slow
def test_two_nodes_agree_with_this_process_to_the_bit(cluster, registry, config, tmp_path):
    expected = contents(scan(config(), registry / "models"))
    found = scan(config(engine="ray", workers=2), registry / "models", run=tmp_path / "run")
    assert contents(found) == expected
    again = scan(config(engine="local", workers=1), registry / "models", run=tmp_path / "run")
    assert contents(again) == expected
    assert all(record.resumed for record in again.values())


@pytest.mark.slow
def test_a_killed_actor_costs_one_attempt(cluster, registry, config, tmp_path):
    victim = str(registry / "models" / "a")
    killer = Killer("scan", victim)
    settings = config(engine="ray", workers=1)
    found = scan(settings, registry / "models", run=tmp_path, notify=killer)
    assert {record.verdict for record in found.values()} == {"inconclusive"}
    assert contents(found) == contents(scan(config(), registry / "models"))
    died = [e for e in read_events(tmp_path) if e["event"] == "worker-died"]
    assert len(died) == 1


def test_a_timeout_ends_one_checkpoint(cluster, registry, config):
    settings = config(
        engine="ray", workers=1, steps=10_000, restarts=500, calibration=None, timeout=3
    )
    (record,) = scan(settings, registry / "models" / "a").values()
    assert record.error_kind == "timeout"


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_room_for(cluster, registry, config):
    with pytest.raises(EngineError, match=r"3 workers of 1 CPU each, .* room for 2"):
        scan(config(engine="ray", workers=3), registry / "models")
    with pytest.raises(EngineError, match=r"1 worker of 2 CPUs each, .* room for 0"):
        scan(config(engine="ray", workers=1, threads=2), registry / "models")


@pytest.mark.slow
def test_the_address_of_a_cluster_answers(cluster):
    check_address(cluster.get_runtime_context().gcs_address)
