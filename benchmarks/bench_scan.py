"""Time to a verdict: a whole scan beside DECREE and Neural Cleanse, on the same models and images.

    python benchmarks/bench_scan.py [--quick] [--classes 10,100] [--seeds 10] [--output FOLDER]

`make bench-foundation` runs it. For each number of classes there are clean and backdoored CLIPs,
fine-tuned from one base (benchmarks/scan_cases.py), and 500 images without labels.
pydetox gets the base and the images, nothing else: it makes its references, searches them, and
judges, with its defaults and with `ScanConfig.quick()`. The peers (benchmarks/published.py) need no
references. Each runs whole, on one thread, in a process of its own; the methods take turns on each
model. Time is CPU time, which other work on the machine changes little. It begins when model and
images are in memory. Memory is the peak of resident memory above what the process had then.

References of one base serve all suspects that moved as far from it. For n suspects, the time of one
is that of its scan and an n-th of the references. A speed is given only where both methods are
right about all models: `scan10.vs_decree` (one suspect), `scan10.vs_decree_10`, and so on. Of more
than ten classes, Neural Cleanse searches a sample, and has a time for all of them but no verdict
(`scan100.vs_neural_cleanse_extrapolated`).

Prints tables, and writes summary.json, flat, and scan.json with everything that was measured. The
image sets have to be there: `make data`. Models and results are cached outside of the repository,
below $XDG_CACHE_HOME/pydetox; a second run computes what changed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import decree as decree_step
from benchmarks import published
from benchmarks.published import DECREE_SETTINGS, PeerVerdict, decree, neural_cleanse
from benchmarks.recording import machine
from benchmarks.scan_cases import Case, Suspect, many_classes, quick_case, ten_classes
from pydetox import ScanConfig, calibrate, scan
from pydetox.atomic import write_file
from pydetox.checkpoints import Provenance, save_checkpoint
from pydetox.compat.cleanse import CleanseRules
from pydetox.data import ImageSet
from pydetox.detect.statistics import FINDINGS, Verdict
from pydetox.errors import PydetoxError
from pydetox.evaluation import evaluate
from pydetox.models import OpenClipModel
from pydetox.reporting import to_json
from pydetox.research.bench.cache import SCAN_CODE, code_digest, key_of
from pydetox.session import as_model
from pydetox.training import TrainConfig

#: Ours, each with its configuration.
OURS: dict[str, Callable[[], ScanConfig]] = {
    "pydetox": ScanConfig,
    "pydetox quick": ScanConfig.quick,
}
#: The peers: what a figure is called, and the settings under which the peer is run. A figure
#: compares with the fastest that is right.
PEERS: dict[str, tuple[str, ...]] = {
    "decree": ("DECREE (CLIP)", "DECREE (CIFAR-10)"),
    "neural_cleanse": ("Neural Cleanse (32)", "Neural Cleanse (256)"),
}
SUSPECTS = (1, 10, 100)


@dataclass(frozen=True)
class Shortened:
    """What is left of the methods.

    Attributes:
        steps: Of our searches, and epochs: of the peers'; None for all. A quick run shows that
            everything runs, and nothing else.
        sample: The number of classes that Neural Cleanse searches; None for all.
    """

    steps: int | None = None
    epochs: int | None = None
    sample: int | None = None

    def ours(self, config: ScanConfig) -> ScanConfig:
        """Return a scan of fewer steps, and of two references that are hardly trained."""
        if self.steps is None:
            return config
        return replace(
            config,
            inversion=replace(config.inversion, steps=self.steps),
            references=2,
            reference_training=TrainConfig(epochs=1, learning_rate=1e-4),
        )


def work(
    method: str, suspect: Path, base: Path, images: ImageSet, seed: int, shortened: Shortened
) -> dict[str, Any]:
    """Run a method on a model, and return its verdict, CPU seconds and peak memory in MiB."""
    torch.set_num_threads(1)
    model, start = as_model(suspect), as_model(base)
    templates = json.loads((base / "templates.json").read_text(encoding="utf-8"))
    head = model.zero_shot_head(images.class_names or (), templates)
    before = _begin_memory()
    clock = time.process_time()
    found: dict[str, Any]
    if method in OURS:
        found = _ours(method, model, start, images, templates, seed, shortened)
    else:
        found = asdict(_peer(method, model, images, head, seed, shortened))
    found["seconds"] = time.process_time() - clock
    if found["backdoored"] is None and method not in OURS:
        assert shortened.sample is not None
        found["extrapolated"] = found["seconds"] * len(head) / shortened.sample
    found["peak_mib"] = None if before is None else _resident("VmHWM") - before
    return found


def _ours(
    method: str,
    model: OpenClipModel,
    base: OpenClipModel,
    images: ImageSet,
    templates: Sequence[str],
    seed: int,
    shortened: Shortened,
) -> dict[str, Any]:
    config = shortened.ours(replace(OURS[method](), seed=seed))
    clock = time.process_time()
    calibration = calibrate(base, images, suspects=[model], templates=templates, config=config)
    seconds = time.process_time() - clock
    result = scan(
        model, images, base=base, calibration=calibration, templates=templates, config=config
    )
    finding = result.verdict in FINDINGS
    references = (calibration, *calibration.rungs)
    return {
        "backdoored": None if result.verdict == Verdict.INCONCLUSIVE else finding,
        "verdict": result.verdict.value,
        "target": result.target,
        "p_value": result.detection.p_value,
        "p_l1": result.detection.smallest_p_l1,
        "passes": result.tower_passes,
        "reference_passes": sum(one.tower_passes for r in references for one in (r, *r.others)),
        "references_seconds": seconds,
    }


def _peer(
    method: str,
    model: OpenClipModel,
    images: ImageSet,
    head: torch.Tensor,
    seed: int,
    shortened: Shortened,
) -> PeerVerdict:
    name, _, setting = method.removesuffix(")").partition(" (")
    if name == "DECREE":
        settings = DECREE_SETTINGS["CLIP" if setting == "CLIP" else "cifar10"]
        settings = replace(settings, epochs=shortened.epochs or settings.epochs)
        return decree(model, images.images, settings, seed=seed)
    rules = CleanseRules()
    rules = replace(rules, epochs=shortened.epochs or rules.epochs)
    targets = None
    if shortened.sample is not None and shortened.sample < len(head):
        order = torch.randperm(len(head), generator=torch.Generator().manual_seed(seed))
        targets = sorted(order[: shortened.sample].tolist())
    return neural_cleanse(
        model,
        images.images,
        head,
        batch_size=int(setting),
        seed=seed,
        rules=rules,
        targets=targets,
    )


def _begin_memory() -> float | None:
    """Reset the peak of resident memory; return the present one in MiB, None if not on Linux."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(
    case: Case,
    seed: int,
    methods: Sequence[str],
    shortened: Shortened,
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a row for each model and method, from the cache where nothing changed."""
    head = case.base.zero_shot_head(case.test.class_names or (), case.templates)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = _saved(case.base, Path(folder) / "base", seed)
        write_file(base / "templates.json", json.dumps(case.templates))
        for suspect in case.suspects:
            model, planted = suspect.make(), suspect.backdoor
            attack = {} if planted is None else _attack(planted)
            measured = evaluate(model, case.test, head, **attack)
            saved = _saved(model, Path(folder) / suspect.name, seed)
            for method in methods:
                less = shortened
                if not method.startswith("Neural Cleanse") or (less.sample or 0) >= case.classes:
                    less = replace(less, sample=None)
                key = _key(suspect, method, seed, less)
                found = case.cache.document(key)
                if found is None:
                    job = (method, saved, base, case.images, seed, less)
                    found = case.cache.keep_document(key, _in_own_process(job))
                row = {
                    "classes": case.classes,
                    "model": suspect.name,
                    "method": method,
                    "true_target": None if planted is None else planted.target,
                    "ca": measured.clean_accuracy,
                    "asr": measured.attack_success_rate,
                    **found,
                }
                row["right"] = is_right(row)
                log(f"  {_told(row)}")
                rows.append(row)
    return rows


def _attack(backdoor: Any) -> dict[str, Any]:
    return {"trigger": backdoor.trigger, "target": backdoor.target}


def _saved(model: OpenClipModel, folder: Path, seed: int) -> Path:
    return save_checkpoint(
        folder,
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=None,
        provenance=Provenance(method="bench_scan", seeds={"bench_scan": seed}),
    )


def _key(suspect: Suspect, method: str, seed: int, shortened: Shortened) -> str:
    """Return the name of a result: what decides it, but not how tables are made."""
    parts = (work, Shortened, _ours) if method in OURS else (decree_step, published, work, _peer)
    sources = "".join(inspect.getsource(one) for one in parts).encode()
    content = {
        "model": suspect.key,
        "method": method,
        "seed": seed,
        "shortened": shortened,
        "scan": code_digest(SCAN_CODE),
        "code": hashlib.sha256(sources).hexdigest(),
    }
    return key_of("scan-time", content)


def _in_own_process(job: tuple[Any, ...]) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bench_scan"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *job).result()


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether a verdict is the truth: about a backdoored model, with the right class if it has one.

    DECREE names no class.
    """
    if row["true_target"] is None:
        return row["backdoored"] is False
    named = row["target"] is None or row["target"] == row["true_target"]
    return row["backdoored"] is True and named


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return flat figures of all numbers of classes."""
    figures: dict[str, float] = {}
    for classes in sorted({row["classes"] for row in rows}):
        methods = _by_method([row for row in rows if row["classes"] == classes])
        prefix = f"scan{classes}"
        for method, suffix in zip(OURS, ("", "_quick"), strict=True):
            ours = methods[method]
            figures[f"{prefix}.right{suffix}"] = ours["right"]
            figures[f"{prefix}.seconds{suffix}"] = ours["scan_seconds"]
            figures[f"{prefix}.references_seconds{suffix}"] = ours["references_seconds"]
        for name, settings in PEERS.items():
            every = [methods[one] for one in settings if one in methods]
            sampled = [one for one in every if one["extrapolated"]]
            for method, suffix in zip(OURS, ("", "_quick"), strict=True) if sampled else ():
                ours = methods[method]
                each = ours["scan_seconds"] + ours["references_seconds"]
                least = min(one["extrapolated"] for one in sampled)
                figures[f"{prefix}{suffix}.vs_{name}_extrapolated"] = least / each
            every = [one for one in every if not one["extrapolated"]]
            if not every:
                continue
            figures[f"{prefix}.{name}_right"] = max(one["right"] for one in every)
            figures[f"{prefix}.{name}_seconds"] = min(one["scan_seconds"] for one in every)
            right = [one for one in every if one["right"] == 1.0]
            if not right:
                continue
            theirs = min(right, key=lambda one: float(one["scan_seconds"]))
            for method, suffix in zip(OURS, ("", "_quick"), strict=True):
                ours = methods[method]
                if ours["right"] < 1.0:
                    continue
                for n in SUSPECTS:
                    each = ours["scan_seconds"] + ours["references_seconds"] / n
                    at = "" if n == 1 else f"_{n}"
                    figures[f"{prefix}{suffix}.vs_{name}{at}"] = theirs["scan_seconds"] / each
                if ours["peak_mib"] and theirs["peak_mib"]:
                    memory = ours["peak_mib"] / theirs["peak_mib"]
                    figures[f"{prefix}{suffix}.memory_vs_{name}"] = memory
    return figures


def _by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return means over the models: share that is right, seconds, and the largest memory."""
    found: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]
        references = fmean(row.get("references_seconds", 0.0) for row in of)
        found[method] = {
            "right": fmean(row["right"] for row in of),
            "references_seconds": references,
            "scan_seconds": fmean(row["seconds"] for row in of) - references,
            "peak_mib": max(row["peak_mib"] or 0.0 for row in of),
            "extrapolated": fmean(row.get("extrapolated", 0.0) for row in of),
        }
    return found


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| classes | model | method | verdict | right | P-L1 | passes | CPU s | references, s "
        "| peak, MiB |",
        "|---:|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        references = row.get("references_seconds")
        p_l1 = "" if row["p_l1"] is None else f"{row['p_l1']:.4f}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(
            f"| {row['classes']} | {'clean' if row['true_target'] is None else 'BadNets'} "
            f"| {row['method']} | {_verdict(row)} | {_right(row)} | {p_l1} "
            f"| {row['passes']:,} | {row['seconds'] - (references or 0):.1f} "
            f"| {'' if references is None else f'{references:.1f}'} | {peak} |"
        )
    return "\n".join(lines)


def _verdict(row: Mapping[str, Any]) -> str:
    if row.get("extrapolated"):
        return f"none: a sample of the classes; all would take {row['extrapolated']:.0f} s"
    if row["backdoored"] is None:
        return str(row["verdict"])
    text = "backdoored" if row["backdoored"] else "clean"
    if row["backdoored"] and row["target"] is not None:
        text += f", class {row['target']}"
    if row.get("p_value") is not None:
        text += f" (p = {row['p_value']:.2g})"
    if row.get("anomaly_index") is not None:
        text += f" (index {row['anomaly_index']:.1f})"
    return text


def _right(row: Mapping[str, Any]) -> str:
    if row.get("extrapolated"):
        return ""
    return "yes" if row["right"] else "**no**"


def _told(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']}, {row['method']}: {_verdict(row)}; right: {_right(row)}; "
        f"{row['seconds']:.1f} s"
    )


def _case(classes: int, seed: int, models: int, device: str) -> Case:
    if classes == 10:
        return ten_classes(seed, models, device)
    return many_classes(classes, seed, 1, device)


@click.command()
@click.option("--quick", is_flag=True, help="A run of seconds that shows that everything works.")
@click.option("--classes", default="10,100", help="Numbers of classes, separated by commas.")
@click.option("--seeds", default="10", help="Seed of base and models; of several, the first.")
@click.option("--models", default=2, help="Clean and backdoored models of ten classes, of each.")
@click.option(
    "--sample",
    default=10,
    help="Of more classes, let Neural Cleanse search so many, for its time alone; 0: all.",
)
@click.option("--methods", default=".", help="Run the peers that match this regular expression.")
@click.option("--device", default="cpu", help="Where the models are trained; scans run on the CPU.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/foundation"))
def main(
    quick: bool,
    classes: str,
    seeds: str,
    models: int,
    sample: int,
    methods: str,
    device: str,
    output: Path,
) -> None:
    """Run the benchmark. pydetox itself always runs."""
    peers = [one for group in PEERS.values() for one in group if re.search(methods, one)]
    shortened = Shortened(steps=5, epochs=1) if quick else Shortened(sample=sample or None)
    seed = int(seeds.partition(",")[0])
    rows = list[dict[str, Any]]()

    def log(text: str) -> None:
        click.echo(text, err=True)

    try:
        for number in (10,) if quick else map(int, classes.split(",")):
            case = quick_case() if quick else _case(number, seed, models, device)
            log(f"{case.classes} classes: {case.tower}")
            rows += measure(case, seed, [*OURS, *peers], shortened, log)
    except PydetoxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    figures = summarize(rows)
    output.mkdir(parents=True, exist_ok=True)
    summary = output / "summary.json"
    known = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    measured = {row["classes"] for row in rows}
    prefixes = tuple(f"scan{number}{end}" for number in measured for end in (".", "_quick."))
    rest = {key: value for key, value in known.items() if not key.startswith(prefixes)}
    write_file(summary, to_json({**rest, **figures}) + "\n")
    document = {"rows": rows, "summary": figures, "machine": machine()}
    write_file(output / "scan.json", to_json(document) + "\n")
    click.echo(tables(rows))
    click.echo("\n".join(f"{key:40}{value:10.4g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
