"""The process that measures: stages in order, each noted as it begins and ends.

python -m benchmarks.gpu.stages --device cuda --results figures.jsonl --work build/gpu \\
    --deadline SECONDS STAGE...

The deadline is of `time.monotonic`, which all processes share. Exit code 3: the device was lost,
and another process has to go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import (
    ceilings,
    compiled,
    demo,
    events,
    graphs,
    memory,
    operators,
    plan,
    precision,
    profiling,
    scans,
    sharing,
    steps,
    unlearning,
)
from .recorder import DeviceLostError, Session, stage

RUN: dict[str, Callable[[Session], None]] = {
    "ceilings": ceilings.measure,
    "operators": operators.measure,
    "steps": steps.vit_b32,
    "graphs": graphs.measure,
    "decree": steps.decree,
    "demo": demo.measure,
    "scan_b32": scans.vit_b32,
    "memory": memory.measure,
    "unlearning": unlearning.measure,
    "precision": precision.measure,
    "attention": steps.attention_backends,
    "profile": profiling.measure,
    "steps_l14": steps.vit_l14,
    "scan_l14": scans.vit_l14,
    "compiled": compiled.measure,
    "sharing": sharing.measure,
}


def main() -> int:
    """Run the stages that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="+", choices=list(RUN))
    parser.add_argument("--device", required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        # set_device takes no device without a number.
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    session = Session(device, options.tiny, options.results, options.work)
    expected = {one.name: 0.0 if options.tiny else one.expected for one in plan.STAGES}
    for name in options.stages:
        left = options.deadline - time.monotonic()
        if left < expected[name]:
            reason = f"{left:.0f} s left, {expected[name]:.0f} expected"
            events.append(options.results, event="left out", stage=name, reason=reason)
            continue
        try:
            with stage(session, name):
                RUN[name](session)
        except DeviceLostError:
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
