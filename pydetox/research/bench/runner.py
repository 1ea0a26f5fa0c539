"""Running a plan on several processes. The results do not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from ... import progress
from ...errors import PydetoxError
from ...progress import Progress
from ..defenses import DEFENSES
from .lab import Lab, defense_named
from .models import Suspect
from .plan import Plan
from .summary import summarize

#: A step for a worker: what `_work` dispatches on, and its arguments.
_Step = tuple[str, int, dict[str, Any]]

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_plan: Plan | None = None
_folder: Path | None = None


def run(
    plan: Plan,
    folder: Path,
    *,
    defenses: Sequence[str] | None = None,
    workers: int = 2,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a plan and return everything it measured.

    folder: The folder of the cache; cached results are not computed again. defenses: The names of
    the defences; None for all. workers: The number of processes, each with one thread. log: A
    function that is called with the name of each stage as it begins.

    Returns "plan", "before" (suspects before any defence), "scans", "rows" (one per counted victim
    and defence), "settings" (those of each defence, with the figures of the tuning), "xi",
    "summary" and "seconds" (by stage). Raises what the steps raise, and PydetoxError if a worker
    dies.
    """
    chosen = [one.name for one in DEFENSES] if defenses is None else list(defenses)
    for name in chosen:
        defense_named(name)
    seconds: dict[str, float] = {}
    with _Workers(plan, folder, workers) as pool:

        def stage(name: str, steps: Sequence[_Step]) -> list[dict[str, Any]]:
            log(f"{name}: {len(steps)} steps")
            start = time.perf_counter()
            done = pool.run(name, steps)
            seconds[name] = time.perf_counter() - start
            return done

        victims = [Suspect(s, a) for s in plan.seeds for a in plan.attacks]
        clean = [Suspect(s, None, k) for s in plan.seeds for k in range(plan.clean_models)]
        tuning = [Suspect(plan.tuning_seed, a) for a in plan.tuning_attacks]
        seeds = [*plan.seeds, *([plan.tuning_seed] if tuning else [])]
        stage("bases", [("base", s, {}) for s in seeds])
        before = stage("suspects", [("train", s.seed, {"suspect": s}) for s in victims + clean])
        starts = stage("tuning models", [("train", s.seed, {"suspect": s}) for s in tuning])
        references = [
            Suspect(s, None, k, True) for s in seeds for k in range(plan.reference_models)
        ]
        stage("reference models", [("model", one.seed, {"suspect": one}) for one in references])
        stage("calibrations", [("calibrate", s, {}) for s in seeds])
        accuracy = {row["suspect"]: row["ca_validation"] for row in starts}
        settings = _tune(plan, chosen, tuning, accuracy, stage)
        counted = [v for v, row in zip(victims, before, strict=False) if row["counts"]]
        rows = stage(
            "defences",
            [
                (
                    "defend",
                    victim.seed,
                    {
                        "suspect": victim,
                        "name": name,
                        "setting": settings[name]["setting"],
                        "relapse": name.startswith("pydetox"),
                    },
                )
                for name in chosen
                for victim in counted
            ],
        )
        scans = [row["details"]["scan"] for row in rows if "scan" in row["details"]]
        scanned = {one["suspect"] for one in scans}
        left = [s for s in [*clean, *counted] if s.name not in scanned]
        scans += stage("scans", [("scan", s.seed, {"suspect": s}) for s in left])
        first = plan.seeds[0]
        maps = stage("xi", [("xi", first, {})] if "badnets" in plan.attacks else [])
    result = {
        "plan": plan.to_dict(),
        "torch": torch.__version__,
        "before": before,
        "scans": scans,
        "rows": rows,
        "settings": settings,
        "xi": maps[0] if maps else None,
        "seconds": seconds,
    }
    return {**result, "summary": summarize(result)}


def _tune(
    plan: Plan,
    defenses: Sequence[str],
    tuning: Sequence[Suspect],
    accuracy: Mapping[str, float],
    stage: Callable[[str, Sequence[_Step]], list[dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """Choose each defence's setting on the tuning models; without any, its first one.

    accuracy: CA of the tuning models on their validation images, before any defence.
    Chosen is the least mean ASR among the settings that keep `least_ca_kept` of the clean accuracy,
    or, where none does, the greatest difference of kept accuracy and ASR.
    """
    if not tuning:
        return {name: {"setting": 0, "tried": []} for name in defenses}
    jobs = [
        (name, k, suspect)
        for name in defenses
        for k in range(len(defense_named(name).grid))
        for suspect in tuning
    ]
    steps: list[_Step] = [
        (
            "defend",
            suspect.seed,
            {
                "suspect": suspect,
                "name": name,
                "setting": k,
                "part": "validation",
                "relapse": False,
            },
        )
        for name, k, suspect in jobs
    ]
    tried: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for (name, k, suspect), row in zip(jobs, stage("tuning", steps), strict=True):
        kept = row["ca"] / accuracy[suspect.name]
        tried.setdefault((name, k), []).append((kept, max(row["asr"])))
    settings = {}
    for name in defenses:
        options = []
        for k in range(len(defense_named(name).grid)):
            results = tried[name, k]
            kept = sum(one[0] for one in results) / len(results)
            asr = sum(one[1] for one in results) / len(results)
            options.append({"setting": k, "ca_kept": kept, "asr": asr})
        good = [one for one in options if one["ca_kept"] >= plan.least_ca_kept]
        best = (
            min(good, key=lambda one: (one["asr"], one["setting"]))
            if good
            else max(options, key=lambda one: one["ca_kept"] - one["asr"])
        )
        chosen = int(best["setting"])
        settings[name] = {
            "setting": chosen,
            "config": repr(defense_named(name).grid[chosen]),
            "tried": options,
        }
    return settings


class _Workers:
    """Worker processes of one thread each. A single worker is this process itself."""

    def __init__(self, plan: Plan, folder: Path, count: int) -> None:
        self._plan, self._folder, self._count = plan, folder, count
        self._pool: ProcessPoolExecutor | None = None
        self._threads = torch.get_num_threads()
        self._environment = dict(os.environ)

    def __enter__(self) -> _Workers:
        if self._count > 1:
            # So that torch, imported anew in each, starts no pool of threads.
            os.environ.update(_ONE_THREAD)
            self._pool = ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(self._plan, self._folder),
            )
        else:
            _begin(self._plan, self._folder)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        torch.set_num_threads(self._threads)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for name in _ONE_THREAD:
            before = self._environment.get(name)
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before

    def run(self, description: str, steps: Sequence[_Step]) -> list[dict[str, Any]]:
        """Return the documents of the steps, in their order."""
        with Progress(description, len(steps)) as bar:
            if self._pool is None:
                done = []
                for step in steps:
                    done.append(_work(*step))
                    bar.update(1)
                return done
            futures: list[Future[dict[str, Any]]] = [self._pool.submit(_work, *s) for s in steps]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(1)
            except BrokenProcessPool as error:
                raise PydetoxError(f"{description}: a worker process ended: {error}") from error
            finally:
                for future in futures:
                    future.cancel()
            return [future.result() for future in futures]


def _begin_worker(plan: Plan, folder: Path) -> None:
    progress.silence()
    # Ctrl-C reaches the driver, which cancels what has not begun.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    _begin(plan, folder)


def _follow(driver: int) -> None:
    """End this process when its driver is gone. A killed driver cannot stop its workers."""
    while os.getppid() == driver:
        time.sleep(1)
    os._exit(1)


def _begin(plan: Plan, folder: Path) -> None:
    global _plan, _folder
    torch.set_num_threads(1)
    _plan, _folder = plan, folder
    _lab.cache_clear()


@lru_cache(maxsize=4)
def _lab(seed: int) -> Lab:
    assert _plan is not None
    assert _folder is not None
    return Lab(_plan, seed, _folder)


def _work(kind: str, seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
    lab = _lab(seed)
    if kind == "base":
        _ = lab.base
        return {}
    if kind == "model":
        lab.model(arguments["suspect"])
        return {}
    if kind == "calibrate":
        return lab.calibration().to_dict()
    steps: dict[str, Callable[..., dict[str, Any]]] = {
        "train": lab.train,
        "defend": lab.defend,
        "scan": lab.scan,
        "xi": lab.xi,
    }
    return steps[kind](**arguments)
