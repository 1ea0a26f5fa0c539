"""What precision and early ends do to verdicts, on the demo's models.

    python benchmarks/verdicts.py [--seeds 0-2] [--device cuda]

For every seed the base is calibrated as in the demo, and the clean and the backdoored suspect are
scanned, all classes to the end, in float32 and in bfloat16, each compared with references of the
same precision; in float32 with a second search seed too, to show how much sizes differ anyway.
Two tables go to stdout: the precisions (with --update-docs also into docs/performance.md), and,
from the recorded sizes, what dropping classes at each recorded step would have done. Results are
kept in runs/bench/verdicts; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.demo_models import splits, suspects
from pydetox import ScanConfig, calibrate, scan
from pydetox.atomic import write_file
from pydetox.data import DIGIT_NAMES, DIGIT_TEMPLATES
from pydetox.detect.statistics import Calibration, detect
from pydetox.inversion import Elimination, relative_to_smallest
from pydetox.models.device import find_device
from pydetox.reporting import to_json
from pydetox.reporting.documents import scan_document
from pydetox.research.demo import demo_scan_config, draw_attack
from pydetox.rng import child_seed
from pydetox.session import as_model

FOLDER = Path("runs/bench/verdicts")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- precision -->", "<!-- /precision -->"
#: Name of a run: precision, and what is added to the scan's seed.
RUNS = {"float32": ("float32", 0), "again": ("float32", 1), "bfloat16": ("bfloat16", 0)}
#: Classes whose size is above this multiple of the smallest are dropped without a calibration.
FACTOR = 2.0

Scans = dict[str, dict[str, Any]]


def measure(seed: int, run: str, device: torch.device) -> Scans:
    """Return the scans of both suspects: verdict, target, sizes, history, calibration, seconds."""
    folder = FOLDER if device.type == "cpu" else FOLDER / device.type
    path = folder / f"{seed}-{run}.json"
    if path.is_file():
        found: Scans = json.loads(path.read_text())
        return found
    precision, offset = RUNS[run]
    config = demo_scan_config(seed)
    config = replace(
        config,
        drop_below=None,
        # One family: the replay follows the history of a single search.
        families=("patch",),
        inversion=replace(config.inversion, precision=precision),
    )
    paths, defender = suspects(seed), splits(seed)[1]
    if run == "again":
        calibration = Calibration.from_dict(
            measure(seed, "float32", device)["clean"]["calibration"]
        )
    else:
        calibration = calibrate(
            as_model(paths["base"]).to(device), defender, templates=DIGIT_TEMPLATES, config=config
        )
    found = {}
    for name in ("clean", "backdoored"):
        one = scan(
            as_model(paths[name]).to(device),
            defender,
            calibration=calibration,
            templates=DIGIT_TEMPLATES,
            config=replace(config, seed=child_seed("bench.scan", seed, offset)),
        )
        found[name] = scan_document(one) | {
            "history": one.inversion.history.tolist(),
            "endings": list(one.inversion.endings),
            "steps": one.inversion.trigger_steps.tolist(),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, to_json(found) + "\n")
    result: Scans = json.loads(path.read_text())
    return result


def sizes(values: list[float | None]) -> list[float]:
    """Undo JSON's null for infinity."""
    return [math.inf if value is None else value for value in values]


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the mean |log ratio| of the sizes of two scans, over classes that both have."""
    pairs = zip(sizes(one["class_p_l1"]), sizes(other["class_p_l1"]), strict=True)
    return fmean(abs(math.log(a / b)) for a, b in pairs if math.isfinite(a) and math.isfinite(b))


def precision_table(results: dict[int, dict[str, Scans]]) -> list[str]:
    lines = [
        "| seed | model | float32: verdict, target, P-L1, p | bfloat16 | sizes apart | two seeds "
        "apart |",
        "|---|---|---|---|---|---|",
    ]
    for seed, runs in results.items():
        for name in ("clean", "backdoored"):
            one, again, half = (runs[run][name] for run in RUNS)
            cells = [
                f"{r['verdict']}, {r['weakest_class']}, {r['p_l1']:.4f}, {r['p_value']:.1g}"
                for r in (one, half)
            ]
            lines.append(
                f"| {seed} | {name} | {cells[0]} | {cells[1]} | {apart(one, half):.1%} | "
                f"{apart(one, again):.1%} |"
            )
    seconds = {run: fmean(_each(results, run, "seconds")) for run in RUNS}
    lines += [
        "",
        f'Targets of the attacks: {", ".join(_target(seed) for seed in results)}. "Apart" is the '
        "mean |log ratio| of the ten classes' P-L1. A scan took "
        f"{seconds['bfloat16'] / seconds['float32']:.1f} times as long in bfloat16.",
    ]
    return lines


def elimination_table(results: dict[int, dict[str, Scans]]) -> list[str]:
    """Return the effect of dropping from each recorded step on, from the histories in float32."""
    config = ScanConfig()
    recorded_steps = config.inversion.recorded_steps
    lines = [
        f"floor {config.drop_below}, and without calibration {FACTOR:g} times the smallest; "
        "`again` with the references of the first search seed",
        "",
        "| from step | lowest score of the target | highest of clean models | steps: clean | "
        "backdoored | targets lost | verdicts that change | final smallest over then smallest | "
        "lost without calibration |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for first in (step for step in recorded_steps[2:-1] if step <= 100):
        scores: dict[str, list[float]] = {"clean": [], "backdoored": []}
        shares: dict[str, list[float]] = {"clean": [], "backdoored": []}
        lost, changed, ratio, lost_alone = 0, 0, 1.0, 0
        for seed, name, one in _scans(results):
            calibration = Calibration.from_dict(one["calibration"])
            history = [sizes(row) for row in one["history"]]
            target = DIGIT_NAMES.index(_target(seed)) if name == "backdoored" else None
            now = history[recorded_steps.index(first)]
            class_scores = calibration.at(first).score(now)
            scores[name].append(max(class_scores) if target is None else class_scores[target])
            assert config.drop_below is not None
            kept = 1 + len(calibration.controls)
            rule = Elimination(calibration.progress, config.drop_below, first=first, kept=kept)
            dropped = replay(rule, recorded_steps, history)
            taken = [
                n if step is None else step for n, step in zip(one["steps"], dropped, strict=True)
            ]
            shares[name].append(sum(taken) / sum(one["steps"]))
            lost += target is not None and dropped[target] is not None
            values = [
                history[-1][c] if step is None else history[recorded_steps.index(step)][c]
                for c, step in enumerate(dropped)
            ]
            verdict = detect(values, calibration, has_classes=True, dropped=dropped).verdict
            changed += verdict.value != one["verdict"]
            smallest = min(range(len(now)), key=history[-1].__getitem__)
            ratio = max(ratio, now[smallest] / min(now))
            alone = Elimination(relative_to_smallest, -math.log(FACTOR), first=first)
            lost_alone += replay(alone, recorded_steps, history)[smallest] is not None
        row = [
            str(first),
            f"{min(scores['backdoored']):.1f}",
            f"{max(scores['clean']):.1f}",
            f"{fmean(shares['clean']):.0%}",
            f"{fmean(shares['backdoored']):.0%}",
            str(lost),
            f"{changed} of {sum(map(len, scores.values()))}",
            f"{ratio:.2f}",
            str(lost_alone),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def replay(
    rule: Elimination, recorded_steps: tuple[int, ...], history: list[list[float]]
) -> list[int | None]:
    """Return at which step a rule drops each class of a search whose sizes were all noted."""
    dropped: list[int | None] = [None] * len(history[0])
    now = list(history[0])
    for step, row in zip(recorded_steps[:-1], history[:-1], strict=True):
        for c, new in enumerate(row):
            now[c] = new if dropped[c] is None else now[c]
        out = rule.drop(step, now, [at is None for at in dropped])
        for c, gone in enumerate(out):
            dropped[c] = step if gone and dropped[c] is None else dropped[c]
    return dropped


def _scans(results: dict[int, dict[str, Scans]]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for seed, runs in results.items():
        for run in ("float32", "again"):
            for name, one in runs[run].items():
                yield seed, name, one


def _each(results: dict[int, dict[str, Scans]], run: str, key: str) -> list[float]:
    return [one[key] for runs in results.values() for one in runs[run].values()]


def _target(seed: int) -> str:
    return DIGIT_NAMES[draw_attack(seed).target]


def main() -> int:
    parser = argparse.ArgumentParser(description="Verdicts by precision, and by early ends.")
    parser.add_argument("--seeds", default="0-2", help="first-last, default 0-2")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--update-docs", action="store_true")
    options = parser.parse_args()
    device = find_device(options.device)
    if options.update_docs and device.type != "cpu":
        sys.exit("verdicts: docs/performance.md is about CPUs; leave out --update-docs")
    first, last = (int(part) for part in options.seeds.split("-"))
    results = {
        seed: {run: measure(seed, run, device) for run in RUNS} for seed in range(first, last + 1)
    }
    if device.type == "cuda":
        print(f"Scanned on {torch.cuda.get_device_name(device)}.\n")
    table = "\n".join(precision_table(results))
    print(table, "\n".join(elimination_table(results)), sep="\n\n")
    if options.update_docs:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
