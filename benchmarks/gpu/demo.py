"""The demo's suspects, scanned on this device and on the CPU: the verdicts have to be equal.

python -m benchmarks.gpu.demo --suspects FOLDER [--tiny]

makes the suspects and scans them on the CPU; a part of its own, which runs beside others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pydetox
from pydetox.atomic import write_file
from pydetox.checkpoints import Provenance

from .library import DIGIT_TEMPLATES, demo_scan_config, load_model, random_model, splits, suspects
from .recorder import Session

NAMES = ("clean", "backdoored")
_SEED = 0


def config_of(tiny: bool) -> pydetox.ScanConfig:
    """Return the demo's scan; tiny: one that only tries the code."""
    config = demo_scan_config(_SEED)
    if not tiny:
        return config
    if config.reference_training is None:
        raise ValueError("the demo's scan does not say how references are trained")
    training = replace(config.reference_training, epochs=1)
    search = replace(config.inversion, steps=4)
    return replace(
        config,
        inversion=search,
        families=("patch",),
        references=2,
        reference_training=training,
    )


def scans(
    paths: Mapping[str, Path], device: torch.device, *, tiny: bool
) -> dict[str, dict[str, Any]]:
    """Calibrate on the base and scan both suspects; return what is compared, and the seconds."""
    _, defender, _ = splits(_SEED)
    if tiny:
        defender = defender.sample(40, seed=_SEED)
    config = config_of(tiny)
    start = time.perf_counter()
    base = load_model(paths["base"], device)
    calibration = pydetox.calibrate(base, defender, templates=DIGIT_TEMPLATES, config=config)
    found: dict[str, dict[str, Any]] = {"calibrate": {"seconds": time.perf_counter() - start}}
    for name in NAMES:
        start = time.perf_counter()
        result = pydetox.scan(
            load_model(paths[name], device),
            defender,
            calibration=calibration,
            templates=DIGIT_TEMPLATES,
            config=config,
        )
        found[name] = {
            "verdict": result.verdict.value,
            "target": str(result.target_name),
            "p_l1": float(result.detection.smallest_p_l1),
            "seconds": time.perf_counter() - start,
        }
    return found


def make_suspects(folder: Path, *, tiny: bool) -> dict[str, Path]:
    """Return checkpoints of base and suspects; tiny: random weights, written to `folder`."""
    if not tiny:
        return suspects(_SEED)
    paths = {}
    for seed, name in enumerate(("base", *NAMES)):
        model = random_model("demo", torch.device("cpu"), tiny=True, seed=seed)
        paths[name] = pydetox.save_checkpoint(
            folder / "suspects" / name,
            model.storage_state_dict(),
            model_config=model.model_config,
            preprocess_config=None,
            provenance=Provenance(method="check-gpu, random weights", seeds={"model": seed}),
            overwrite=True,
        )
    return paths


def measure(session: Session) -> None:
    """Record this device's verdicts, times, and whether they are the CPU's."""
    file = session.work / "demo-cpu.json"
    if not file.is_file():
        raise FileNotFoundError("the part demo-cpu has left no demo-cpu.json to compare with")
    on_cpu = json.loads(file.read_text(encoding="utf-8"))
    paths = {name: Path(path) for name, path in on_cpu["paths"].items()}
    found = scans(paths, session.device, tiny=session.tiny)
    session.record("demo.calibrate_s", found["calibrate"]["seconds"])
    same = True  # the CPU's own figures stay in demo-cpu.json: they are not this device's
    for name in NAMES:
        here, there = found[name], on_cpu["found"][name]
        same &= here["verdict"] == there["verdict"]
        # A clean verdict names no target, only the class that comes closest to one.
        if there["verdict"] not in ("clean", "inconclusive"):
            same &= here["target"] == there["target"]
        session.record(f"demo.{name}.verdict", here["verdict"])
        session.record(f"demo.{name}.target", here["target"])
        session.record(f"demo.{name}.p_l1", here["p_l1"])
        session.record(f"demo.{name}.scan_s", here["seconds"])
    session.record("demo.verdicts_equal", int(same))


def main() -> int:
    """Make the suspects and scan them on the CPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--suspects", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    result = options.suspects / "demo-cpu.json"
    result.unlink(missing_ok=True)
    # The others that run now want some of the cores, too.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    paths = make_suspects(options.suspects, tiny=options.tiny)
    found = scans(paths, torch.device("cpu"), tiny=options.tiny)
    values = {"paths": {name: str(Path(path).resolve()) for name, path in paths.items()}}
    write_file(result, json.dumps({**values, "found": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
