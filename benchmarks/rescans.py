"""What re-scans say of repaired models, judged in three ways, and of a second backdoor.

    python benchmarks/rescans.py [--seeds 22-26,28] [--device cuda]
        [--output runs/bench/rescans]

For every seed of the demo, its backdoored suspect is repaired, the trigger unknown. The sizes of
the first re-scan are then judged in three ways: as those of a model that nobody has scanned before
(`alone`), as earlier versions did, which judged every class that the first scan had flagged or
dropped (`single`), and together with the first scan (`both`, see `pydetox.detect.rescan`). A model
with two backdoors, into two classes, is repaired of one of them by a shorter repair. Its re-scan
must find the other.

Prints one row per model, and the shares of findings. Of the classes that the attack does not lead
to, it also prints how much the scores scatter in the re-scan; in clean models, this is 1. A seed
whose file is there is not run again.

    python benchmarks/rescans.py --simulate

Simulates the share of repaired models in which a class without a backdoor is a finding, for scores
of clean classes that scatter more than those of clean models in both scans, with a correlation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy.special import ndtr

from benchmarks.demo_models import splits, suspects
from pydetox import calibrate, detox
from pydetox.atomic import write_file
from pydetox.data import DIGIT_NAMES, DIGIT_TEMPLATES
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.distance import model_distance
from pydetox.detect.rescan import families, rejudged
from pydetox.detect.result import ScanResult
from pydetox.detect.statistics import RepairHistory, p_values_of_suspects
from pydetox.evaluation import evaluate
from pydetox.models import OpenClipModel
from pydetox.models.device import find_device
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.result import DetoxResult
from pydetox.reporting import to_json
from pydetox.research import demo
from pydetox.research.attacks import Backdoor, badnets, plant
from pydetox.rng import child_seed
from pydetox.session import as_model
from pydetox.training import TrainConfig, train_on_prompts

WAYS = ("alone", "single", "both")

#: What is simulated: models, classes besides the repaired one, classes that the first scan drops,
#: families of triggers, and the deviations of scores and their correlations between the scans.
MODELS, OTHERS, DROPPED, FAMILIES = 100_000, 9, 5, 2
WIDTHS, CORRELATIONS = (1.0, 1.2, 1.5), (0.0, 0.6, 0.9)


def measure(seed: int, device: torch.device) -> dict[str, Any]:
    """Return what the re-scans of one seed's models say."""
    paths, (attacker, defender, test) = suspects(seed), splits(seed)
    base, attack = as_model(paths["base"]).to(device), demo.draw_attack(seed)
    config = replace(demo.demo_scan_config(seed), inversion=demo._SEARCH)
    calibration = calibrate(base, defender, templates=DIGIT_TEMPLATES, config=config)
    second = (attack.target + 5) % len(DIGIT_NAMES)
    first_seed, second_seed = (child_seed("bench.suspect", seed, n) for n in ("rescan", "second"))
    poisoned, _ = plant(
        attacker,
        [
            Backdoor(attack.trigger, attack.target, 0.1),
            Backdoor(badnets(attacker.images.shape[-1], seed=second_seed), second, 0.1),
        ],
        seed=first_seed,
    )
    tuning = TrainConfig(epochs=15, learning_rate=demo.FINE_TUNING_RATE, seed=first_seed)
    two = train_on_prompts(base, poisoned, DIGIT_TEMPLATES, tuning, description="two backdoors")
    rows: dict[str, Any] = {"seed": seed, "target": DIGIT_NAMES[attack.target]}
    for name, model, target, unlearning in (
        ("repaired", as_model(paths["backdoored"]).to(device), None, UnlearnConfig()),
        ("one of two", two, attack.target, UnlearnConfig(passes=1, warps=0)),
    ):
        result = detox(
            model,
            defender,
            calibration=calibration,
            templates=DIGIT_TEMPLATES,
            config=config,
            target=target,
            unlearning=unlearning,
        )
        head = model.zero_shot_head(DIGIT_NAMES, DIGIT_TEMPLATES)
        asr = [
            evaluate(one, test, head, trigger=attack.trigger, target=attack.target)
            for one in (model, result.model)
        ]
        rows[name] = _row(result, config, base, model) | {
            "asr": [one.attack_success_rate for one in asr],
            "ca": [one.clean_accuracy for one in asr],
        }
    rows["second"] = DIGIT_NAMES[second]
    return rows


def _row(
    result: DetoxResult, config: ScanConfig, base: OpenClipModel, model: OpenClipModel
) -> dict[str, Any]:
    rescans = [one.rescan for one in result.rounds if one.rescan is not None]
    if not rescans:
        return {"before": result.before.verdict.value, "rescan": None}
    first = rescans[0]
    ways = {
        "alone": rejudged(first, config, RepairHistory()),
        "single": rejudged(first, config, RepairHistory(result.before.cleared())),
        "both": first,
    }
    return {
        "before": result.before.verdict.value,
        "found before": _suspects(result.before),
        "dropped before": sorted(
            {c for one in families(result.before) for c in _dropped(one.detection.dropped)}
        ),
        "rescan": {name: _said(one) for name, one in ways.items()},
        "p before": p_values_of_suspects([one.detection for one in families(result.before)]),
        "scores": {one.family: list(one.detection.class_scores) for one in families(first)},
        "passes": len(result.rounds),
        "distance": [model_distance(base, one) for one in (model, result.model)],
        "seconds": dict(result.seconds),
    }


def _dropped(steps: Sequence[int | None]) -> list[int]:
    return [c for c, step in enumerate(steps) if step is not None]


def _suspects(one: ScanResult) -> list[str]:
    found = {c for family in families(one) for c in family.detection.suspects}
    return [DIGIT_NAMES[c] for c in sorted(found)]


def _said(one: ScanResult) -> dict[str, Any]:
    return {
        "verdict": one.verdict.value,
        "target": one.target_name,
        "suspects": _suspects(one),
        "p": one.detection.p_value,
    }


def _seeds(text: str) -> list[int]:
    """Return the seeds that `text` stands for, such as 22-26,28."""
    ends = ([int(end) for end in part.split("-")] for part in text.split(","))
    return [seed for one in ends for seed in range(one[0], one[-1] + 1)]


def _line(seed: int, name: str, row: Mapping[str, Any]) -> str:
    if row["rescan"] is None:
        return f"seed {seed}, {name}: {row['before']}, nothing was subtracted"
    said = (
        f"{way} {found['verdict']}, {found['target']}, p {found['p']:.2g}"
        for way, found in row["rescan"].items()
    )
    before, after = row["asr"]
    near, far = row["distance"]
    return (
        f"seed {seed}, {name}: ASR {before:.1%} -> {after:.1%}, distance from the base {near:.3f} "
        f"-> {far:.3f}; {'; '.join(said)}"
    )


def simulate() -> None:
    """Print the shares of false alarms at nominal 5% and 1% as a table."""
    generator = np.random.default_rng(0)
    print("| deviation | correlation | " + " | ".join(("first scan", *WAYS)) + " |")
    print("|---:|---:|" + "---|" * (1 + len(WAYS)))
    for width, correlation in itertools.product(WIDTHS, CORRELATIONS):
        own, new = generator.standard_normal((2, MODELS, OTHERS, FAMILIES))
        after = correlation * own + math.sqrt(1 - correlation**2) * new
        chances = [ndtr(-width * scores) for scores in (own, after)]
        every = (1 + OTHERS) * FAMILIES
        before, alone = (_adjusted(chance, every).min(axis=2) for chance in chances)
        # What the re-scan judges besides the repaired class, and is corrected for.
        suspects = before < 0.05
        judged = suspects | (np.arange(OTHERS) < DROPPED)
        tries = (1 + judged.sum(axis=1)) * FAMILIES
        single = _adjusted(chances[1], tries[:, None, None]).min(axis=2)
        p_values = {
            "first scan": before,
            "alone": alone,
            "single": np.where(judged, single, 1.0),
            "both": np.maximum(before, single),
        }
        cells = (
            ", ".join(f"{(p < level).any(axis=1).mean():.1%}" for level in (0.05, 0.01))
            for p in p_values.values()
        )
        print(f"| {width} | {correlation} | " + " | ".join(cells) + " |")


def _adjusted(chance: Any, tries: Any) -> Any:
    """Return Sidak's correction of `chance` for that many tries, as arrays."""
    return -np.expm1(tries * np.log1p(-chance))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", default="22-26,28", help="first-last or single ones, default 22-26,28"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench/rescans"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--simulate", action="store_true", help="simulate false alarms instead")
    options = parser.parse_args()
    if options.simulate:
        simulate()
        return 0
    device = find_device(options.device)
    # A seed's models are others on another device: rounding decides a training.
    folder = options.output if device.type == "cpu" else options.output / device.type
    results = []
    for seed in _seeds(options.seeds):
        path = folder / f"{seed}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, to_json(measure(seed, device)) + "\n")
        results.append(json.loads(path.read_text()))
        for name in ("repaired", "one of two"):
            print(_line(seed, name, results[-1][name]), flush=True)
    for name in ("repaired", "one of two"):
        rows = [one for one in results if one[name]["rescan"] is not None]
        for way in WAYS:
            said = [(one, set(one[name]["rescan"][way]["suspects"])) for one in rows]
            planted = [{one["target"]} for one in rows]
            if name == "one of two":
                planted = [{one["target"], one["second"]} for one in rows]
            pairs = zip(said, planted, strict=True)
            alarms = sum(bool(suspects - known) for (_, suspects), known in pairs)
            print(f"{name}, {way}: {alarms} of {len(said)} flag a class that was never planted")
            if name == "one of two":
                right = sum(one["second"] in suspects for one, suspects in said)
                print(f"{name}, {way}: {right} of {len(said)} flag the second class")
    scores = [
        score
        for one in results
        if one["repaired"]["rescan"] is not None
        for family in one["repaired"]["scores"].values()
        for c, score in enumerate(family)
        if DIGIT_NAMES[c] != one["target"]
    ]
    if scores:
        width = math.sqrt(fmean(score**2 for score in scores))
        print(f"scores of classes without a backdoor, root mean square: {width:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
