"""The demo over several seeds: which of its promises hold for which seed.

    python benchmarks/demo_seeds.py [--seeds 0-9] [--device cuda] [--output runs/demo-seeds]

Prints one row per seed to stdout, and exits with 1 when fewer than 8 of 10 hold all of them. A
seed whose summary is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydetox.models.device import find_device
from pydetox.research.demo import run_demo

LEAST_SHARE = 0.8


def promises(summary: dict[str, Any]) -> dict[str, bool]:
    """Return what must hold of one run, by name."""
    before, after, found = summary["before"], summary["after"], summary["backdoored"]
    return {
        "clean": summary["clean"]["verdict"] == "clean",
        "found": found["verdict"] == "backdoored",
        "target": found["target_true"] == found["target_inferred"],
        "asr before": before["asr"] >= 0.95,
        "asr after": after["asr"] <= 0.05,
        "ca kept": after["ca"] >= 0.95 * before["ca"],
        "rescan": summary["rescan"]["verdict"] == "clean",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0-9", help="first-last, default 0-9")
    parser.add_argument("--output", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    options = parser.parse_args()
    device = find_device(options.device)
    first, last = (int(part) for part in options.seeds.split("-"))
    good, seeds = 0, range(first, last + 1)
    for seed in seeds:
        folder = options.output / str(seed)
        done = folder / "summary.json"
        summary = (
            json.loads(done.read_text())
            if done.is_file()
            else run_demo(folder, seed, device=device).summary
        )
        held = promises(summary)
        good += all(held.values())
        before, after = summary["before"], summary["after"]
        broken = ", ".join(name for name, holds in held.items() if not holds)
        print(
            f"seed {seed}: {'all hold' if not broken else 'BROKEN: ' + broken}; "
            f"asr {before['asr']:.3f} -> {after['asr']:.3f}, "
            f"ca {before['ca']:.3f} -> {after['ca']:.3f}, "
            f"p-l1 {summary['backdoored']['p_l1']:.4f} -> {summary['rescan']['p_l1']:.4f}, "
            f"clean {summary['clean']['p_l1']:.4f}, {sum(summary['seconds'].values()):.0f} s",
            flush=True,
        )
    print(f"{good} of {len(seeds)} seeds hold all of them")
    return 0 if good >= LEAST_SHARE * len(seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
