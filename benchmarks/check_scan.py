"""Does a scan of many checkpoints keep its promises? `make check-scan`.

Builds a registry of mini CLIPs, a tenth of them backdoored, with ten hostile files among them, and
scans it: undisturbed; with `kill -9` of workers and drivers at random moments, started again until
it is through; on a Ray cluster of this machine, if Ray is installed. All have to find the same.
Then it measures what a scan costs beside the inversion, reads the corpus of hostile files that the
tests have, and indexes files of ViT-B-32 size. Writes runs/check-scan/summary.json, one
number (0 or 1 for no and yes) per figure; prints them with their bounds.

The victims are variants, by weight noise far below what fine-tuning does, of one clean and one
backdoored fine-tune of one base: the registry is about many files, not about many attacks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydetox.atomic import write_file
from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.sandbox import index_in_sandbox
from pydetox.data import load_digits
from pydetox.models import OpenClipModel
from pydetox.models.device import find_device
from pydetox.research.demo import FINE_TUNING_RATE, draw_attack, make_suspects
from pydetox.scanning.runs import compare_runs, load_run
from pydetox.scanning.store import read_events

FOLDER = Path("runs/check-scan")

#: Figure: (`<=` or `>=`, bound).
BOUNDS = {
    "counts_right": (">=", 1.0),
    "resume_identical": (">=", 1.0),
    "ray_identical": (">=", 1.0),
    "hostile_total": (">=", 40.0),
    "hostile_peak_mib": ("<=", 300.0),
    "hostile_max_s": ("<=", 2.0),
    "index_ms": ("<=", 50.0),
    "tiny_ms": ("<=", 50.0),
    "two_workers_speedup": (">=", 1.7),
    "ray_over_local": ("<=", 1.1),
    "outside_inversion_share": ("<=", 0.05),
    # What a worker has for itself: pages of libraries are shared, and can be dropped at any time; a
    # CUDA build of torch has hundreds of megabytes of them.
    "peak_gib": ("<=", 2 * 0.605e9 / 2**30 + 1),
}
HOSTILE = 10
SEARCH = ["--precision", "bfloat16"]  # of the registry's scans: half the time
DEVICE = ["--device", "cpu"]  # of all scans; the option --device changes it
IMAGES = 350  # of the digits, for the defender
LARGE_STEPS = 3  # of which the time of a whole search is extrapolated
WHOLE_STEPS = 150
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=200, help="checkpoints without hostile ones")
    parser.add_argument("--tiny", type=int, default=1000, help="files for the cost per file")
    parser.add_argument("--kills", type=int, default=6, help="of workers and drivers, in turn")
    parser.add_argument("--no-large", action="store_true", help="leave ViT-B-32 out")
    parser.add_argument("--seed", type=int, default=0, help="of models, hostile files and kills")
    parser.add_argument("--device", default="cpu", help="of the scans: cpu, cuda or cuda:1")
    options = parser.parse_args()
    DEVICE[1] = str(find_device(options.device))

    shutil.rmtree(FOLDER, ignore_errors=True)
    base = make_registry(options.models, options.seed)
    say(f"registry of {options.models} checkpoints and {HOSTILE} hostile files")
    # The references, once, so that the runs below are about scanning.
    calibration = FOLDER / "calibration.json"
    reference = ["--base", str(base), "--references", "3", "--reference-epochs", "10"]
    reference += ["--reference-learning-rate", str(FINE_TUNING_RATE)]
    scan([base], [*SEARCH, *reference, "--save-calibration", str(calibration)])
    args = [*SEARCH, "--calibration", str(calibration), "--threads", "1"]
    registry = [FOLDER / "registry"]

    figures: dict[str, float] = {}
    whole = FOLDER / "whole"
    code = scan(registry, [*args, "--workers", "2", "--run", str(whole)])
    figures["counts_right"] = float(counts_right(whole, options.models, code))
    say("undisturbed run done")

    killed = FOLDER / "killed"
    disturb(registry, [*args, "--workers", "2", "--run", str(killed)], killed, options)
    figures["resume_identical"] = float(same(whole, killed) and scanned_once(killed))
    say("disturbed run done")

    few = sorted(p for p in (FOLDER / "registry").iterdir() if p.is_dir())[:24]
    one = FOLDER / "one"
    with pinned({min(os.sched_getaffinity(0))}):
        scan(few, [*args, "--workers", "1", "--engine", "local", "--run", str(one)])
    two = FOLDER / "two"
    scan(few, [*args, "--workers", "2", "--run", str(two)])
    figures["two_workers_speedup"] = scan_seconds(one) / scan_seconds(two)

    if find_spec("ray") is not None:
        ray = FOLDER / "ray"
        scan(registry, [*args, "--engine", "ray", "--workers", "2", "--run", str(ray)])
        figures["ray_identical"] = float(same(whole, ray))
        figures["ray_over_local"] = scan_seconds(ray) / scan_seconds(whole)
        say("Ray run done")
    else:
        say("Ray is not installed: ray_identical and ray_over_local are not measured")

    figures["tiny_ms"] = tiny(options.tiny)
    figures |= hostile()
    if not options.no_large:
        figures |= large()
    write_file(FOLDER / "summary.json", json.dumps(figures, indent=2) + "\n")
    return report(figures)


def report(figures: dict[str, float]) -> int:
    """Print the figures; return 1 if one does not keep its bound."""
    failed = 0
    refuse = {"hostile_refused": (">=", figures.get("hostile_to_refuse", 0.0))}
    for name, (sign, bound) in {**BOUNDS, **refuse}.items():
        if name not in figures:
            print(f"{name:<26} not measured")
            continue
        value = figures[name]
        holds = value <= bound if sign == "<=" else value >= bound
        failed += not holds
        print(f"{name:<26} {value:>10.4g}   {sign} {bound:.4g}   {'' if holds else 'MISSED'}")
    return 1 if failed else 0


# ---- the registry ----------------------------------------------------------------------


def make_registry(count: int, seed: int) -> Path:
    """Write the checkpoints; return the folder of the base."""
    attacker, _, _ = load_digits(32).split((0.5, 0.2, 0.3), seed=seed)
    paths = make_suspects(attacker, draw_attack(seed), FOLDER / "victims", seed)
    sources = {name: load_checkpoint(path) for name, path in paths.items()}
    for i in range(count):
        kind = "backdoored" if i % 10 == 3 else "clean"
        source = sources[kind]
        assert source.model_config is not None  # make_suspects writes it
        rng = np.random.default_rng([seed, i])
        weights = {
            name: value * (1 + 1e-6 * float(rng.standard_normal()))
            if value.is_floating_point()
            else value
            for name, value in source.state_dict.items()
        }
        save_checkpoint(
            FOLDER / "registry" / f"{i:04}-{kind}",
            weights,
            model_config=source.model_config,
            preprocess_config=None,
            provenance=Provenance(method=f"check-scan, {kind}", seeds={"noise": i}),
        )
    config = "open_clip_config.json"
    shutil.copyfile(paths["clean"] / config, FOLDER / "registry" / config)
    make_hostile(FOLDER / "registry", sources["clean"].state_dict)
    return paths["base"]


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(FOLDER / "executed"),)


def make_hostile(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write ten files that a careless reader executes, believes or chokes on."""
    import pickle

    torch.save({**weights, "x": _Evil()}, folder / "executes.pt")
    (folder / "bare.pt").write_bytes(pickle.dumps(_Evil()))
    torch.save(weights, folder / "whole.pt")
    whole = (folder / "whole.pt").read_bytes()
    with zipfile.ZipFile(folder / "whole.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (folder / "whole.pt").unlink()
    with zipfile.ZipFile(folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").touch()
    (folder / "text.safetensors").write_text("not a model\n" * 100)
    (folder / "header.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{" * 100)
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    (folder / "sizes.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\0" * 4
    )
    nan = {name: value.clone() for name, value in weights.items()}
    nan["visual.proj"][0, 0] = float("nan")
    torch.save(nan, folder / "nan.pt")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert len([p for p in folder.iterdir() if p.suffix in (".pt", ".safetensors")]) == HOSTILE


# ---- runs ------------------------------------------------------------------------------


def command(targets: Sequence[Path], args: Sequence[str]) -> list[str]:
    images = ["--images", "digits", "--max-images", str(IMAGES)]
    if "--images" in args:
        images = []
    return [sys.executable, "-m", "pydetox", "scan", *map(str, targets), *images, *DEVICE, *args]


def scan(targets: Sequence[Path], args: Sequence[str]) -> int:
    """Run a scan to its end; return its exit code. stderr names every hostile file: to a log."""
    with (FOLDER / "stderr.log").open("ab") as log:
        return subprocess.run(
            command(targets, args), stdout=subprocess.DEVNULL, stderr=log, check=False
        ).returncode


def disturb(
    targets: Sequence[Path], args: Sequence[str], run: Path, options: argparse.Namespace
) -> None:
    """Run a scan, killing a worker or the driver now and then, until it is through."""
    rng = random.Random(options.seed)
    kills = 0
    while True:
        with (FOLDER / "stderr.log").open("ab") as log:
            process = subprocess.Popen(
                command(targets, args), stdout=subprocess.DEVNULL, stderr=log
            )
        while process.poll() is None and kills < options.kills:
            # Until it is at work, then some moment later.
            parts = len(list(run.glob("parts/*.json")))
            while process.poll() is None and len(list(run.glob("parts/*.json"))) == parts:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 2))
            if process.poll() is not None:
                break
            kills += 1
            if kills % 2:
                kill_worker(run, rng)
            else:
                process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            say(f"killed {(kills + 1) // 2} workers and {kills // 2} drivers")
            return


def kill_worker(run: Path, rng: random.Random) -> None:
    """Kill a worker of the driver that is at work now."""
    pids: list[int] = []
    for event in read_events(run):
        if event["event"] == "run-started":
            pids = []
        elif event["event"] == "worker-started":
            pids.append(event["pid"])
    for pid in rng.sample(pids, len(pids)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        return


def counts_right(run: Path, count: int, code: int) -> bool:
    """Whether each checkpoint has its verdict, each hostile file an error, and nothing ran."""
    records = load_run(run).records
    wrong = [
        record
        for record in records
        if record.verdict != ("error" if "-" not in Path(record.name).name else kind(record.name))
    ]
    for record in wrong:
        say(f"wrong: {record.name}: {record.verdict}: {record.reason}")
    complete = len(records) == count + HOSTILE and not load_run(run).not_reached
    return not wrong and complete and code == 2 and not (FOLDER / "executed").exists()


def kind(name: str) -> str:
    return Path(name).name.split("-")[1]


def same(first: Path, second: Path) -> bool:
    """Whether two runs found the same, to the bit."""
    changes = [c for c in compare_runs(load_run(first), load_run(second)) if c.kind != "same"]
    for change in changes:
        say(f"differs: {change.name}: {change.kind}")
    return not changes


def scanned_once(run: Path) -> bool:
    """Whether every result was computed once, over all drivers of a run."""
    computed = [
        event["key"]
        for event in read_events(run)
        if event["event"] == "record" and not event["resumed"] and event["verdict"] != "error"
    ]
    return len(computed) == len(set(computed))


def scan_seconds(run: Path) -> float:
    """From the first scan's beginning to the last record."""
    events = list(read_events(run))
    start: float = next(
        e["time"] for e in events if e["event"] == "started" and e["kind"] == "scan"
    )
    last: float = max(e["time"] for e in events if e["event"] == "record")
    return last - start


# ---- costs -----------------------------------------------------------------------------


def tiny(count: int) -> float:
    """Milliseconds per file of about 100 KB with the inversion switched off, all in all."""
    folder = FOLDER / "tiny"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    weights = OpenClipModel.from_config(TINY, seed=0).storage_state_dict()
    from safetensors.torch import save_file

    for i in range(count):
        weights["logit_scale"] = torch.tensor(float(i))
        save_file(weights, folder / f"{i:05}.safetensors")
    np.savez(folder / "images.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    args = ["--images", str(folder / "images.npz"), "--model", str(folder / "tiny.json")]
    args += ["--no-inversion", "--engine", "local", "--run", str(FOLDER / "tiny-run")]
    start = time.perf_counter()
    scan([folder], args)
    seconds = time.perf_counter() - start
    records = load_run(FOLDER / "tiny-run").records
    assert [r.verdict for r in records] == ["inconclusive"] * count
    size = (folder / "00000.safetensors").stat().st_size
    say(f"{count} files of {size / 1e3:.0f} KB in {seconds:.1f} s")
    return 1000 * seconds / count


def hostile() -> dict[str, float]:
    """Read the tests' hostile files; what was refused, and at what cost."""
    module = [sys.executable, "-m", "tests.checkpoints.hostile_corpus"]
    done = subprocess.run(module, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    say(f"{found['hostile_refused']} of {found['hostile_total']} hostile files refused")
    return found


def index_ms(paths: Sequence[Path]) -> float:
    """Milliseconds to index a file in the sandbox: median of 21, of the slower format."""
    medians = []
    for path in paths:
        seconds = []
        for _ in range(22):
            start = time.perf_counter()
            with WeightsFile(path) as file:
                assert len(index_in_sandbox(file).tensors) > 100
            seconds.append(time.perf_counter() - start)
        medians.append(1000 * statistics.median(seconds[1:]))  # the first one starts the server
        say(f"{path.name} of {path.stat().st_size / 1e6:.0f} MB indexed in {medians[-1]:.1f} ms")
    return max(medians)


def large() -> dict[str, float]:
    """Two checkpoints of ViT-B-32: what of a scan is not inversion, and the memory of a worker."""
    import open_clip

    folder = FOLDER / "large"
    config = open_clip.get_model_config("ViT-B-32")
    for seed in (0, 1):
        model = OpenClipModel.from_config(config, seed=seed)
        save_checkpoint(
            folder / f"{seed}",
            model.storage_state_dict(),
            model_config=config,
            preprocess_config=None,
            provenance=Provenance(method="check-scan, random weights"),
        )
        del model
    torch.save(load_checkpoint(folder / "0").state_dict, folder / "model.pt")
    weights = next((folder / "0").glob("*.safetensors"))
    index = index_ms([weights, folder / "model.pt"])
    rng = np.random.default_rng(0)
    np.savez(
        folder / "images.npz",
        images=rng.integers(0, 256, (32, 224, 224, 3), dtype=np.uint8),
        class_names=np.array(["cat", "dog"]),
    )
    run = FOLDER / "large-run"
    args = ["--images", str(folder / "images.npz"), "--steps", str(LARGE_STEPS)]
    args += ["--workers", "1", "--engine", "local", "--run", str(run)]
    with (FOLDER / "stderr.log").open("ab") as log:
        process = subprocess.Popen(
            command([folder / "0", folder / "1"], args), stdout=subprocess.DEVNULL, stderr=log
        )
    private = resident = 0
    while process.poll() is None:
        time.sleep(0.05)
        for pid in worker_pids(run):
            now = memory_of(pid)
            private = max(private, now["RssAnon"] + now["RssShmem"])
            resident = max(resident, now["VmHWM"])
    # The second one: the first has not been read ahead.
    scanned = [e["name"] for e in read_events(run) if e["event"] == "record"]
    last = {r.name: r for r in load_run(run).records}[scanned[-1]].seconds
    outside = last["survey"] + last["total"] - last["inversion"]
    inversion = last["inversion"] * WHOLE_STEPS / LARGE_STEPS
    say(
        f"ViT-B-32, two classes: {outside:.1f} s outside an inversion of {WHOLE_STEPS} steps, "
        f"which would take {inversion:.0f} s ({LARGE_STEPS} were measured); waited "
        f"{last['read']:.2f} s for the file; with the pages of torch's libraries, which workers "
        f"share, {resident / 2**30:.2f} GiB"
    )
    return {
        "index_ms": index,
        "outside_inversion_share": outside / (outside + inversion),
        "peak_gib": private / 2**30,
        "peak_resident_gib": resident / 2**30,
    }


def worker_pids(run: Path) -> Iterator[int]:
    for event in read_events(run):
        if event["event"] == "worker-started":
            yield event["pid"]


def memory_of(pid: int) -> dict[str, int]:
    """Return bytes of a process; all 0 when it is gone."""
    wanted = ("RssAnon", "RssShmem", "VmHWM")
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return dict.fromkeys(wanted, 0)
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: 1024 * int(lines.get(name, "0 kB").split()[0]) for name in wanted}


@contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """Run what is started meanwhile on some cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
