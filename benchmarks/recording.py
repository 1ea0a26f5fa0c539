"""The figures of a run of the benchmarks, and the bounds that they have to keep.

A benchmark calls `record`; when the run ends, conftest.py prints all figures as one table and
writes them to runs/bench/summary.json, merged with what earlier runs wrote there. The bounds are
those of a CPU. The figures of a GPU go to runs/bench/cuda/summary.json, and the bounds of a GPU are
those of `make check-gpu` (benchmarks/gpu/plan.py).
"""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from pydetox import build_info
from pydetox.atomic import write_file

FOLDER = Path("runs/bench")

#: Figure: (`<=` or `>=`, bound). Ratios of medians of interleaved runs, with 2 threads, unless said
#: otherwise.
BOUNDS: dict[str, tuple[str, float]] = {
    "stamp_224.vs_eager": (">=", 10.0),
    "stamp_224.vs_compile": (">=", 3.0),
    "stamp_224.over_copy": ("<=", 2.5),
    "stamp_224.peak_over_output": ("<=", 1.1),
    "stamp_64.vs_eager": (">=", 10.0),
    "stamp_64.vs_compile": (">=", 3.0),
    "stamp_64.over_copy": ("<=", 2.5),
    "step_vit_b32.overhead": ("<=", 0.04),
    "step_mini.overhead": ("<=", 0.15),
    "step_vit_b32_fp32.over_gemm": ("<=", 1.2),
    "step_vit_b32_bf16.over_gemm": ("<=", 1.7),
    "step_vit_b32_fp32.vs_decree": (">=", 1.6),
    "step_vit_b32_bf16.vs_decree": (">=", 2.6),
    "step_mini.vs_decree": (">=", 1.8),
    "alpha21.over_eval": ("<=", 1.05),
    "collapse.vs_eager": (">=", 2.0),
    "zero_shot_10.vs_eager": (">=", 1.5),
    "zero_shot_1000.over_products": ("<=", 2.0),
    "update_224.vs_eager": (">=", 5.0),
    "update_224.over_copy": ("<=", 2.0),
    "targeted10.vs_sequential": ("<=", 0.4),
    "gram8.over_read": ("<=", 1.5),
    "project16.over_read": ("<=", 1.3),
    "sketch4096.over_read": ("<=", 2.0),
    "matmul32.over_floor": ("<=", 1.5),
    "apply.over_add": ("<=", 1.3),
    # Twice eager PyTorch where the table decides; where products do, eager's own take most of it.
    **{f"mix_{v}k_d{d}_r8.vs_eager": (">=", 2.0) for v in (30, 128) for d in (384, 768)},
    **{
        f"mix_{v}k_d{d}_r{r}.over_floor": ("<=", 1.5)
        for v in (30, 128)
        for d in (384, 768)
        for r in (8, 64, 256)
    },
    "mix_bf16.over_floor": ("<=", 1.5),
    "top_swaps_r64.over_floor": ("<=", 1.5),
    # MiB of resident memory, above what a process begins with.
    "stream.extra_mib": ("<=", 64.0),
    # Milliseconds.
    "index_pt.ms": ("<=", 50.0),
    "index_safetensors.ms": ("<=", 50.0),
}

_figures: dict[str, float] = {}
_device = torch.device("cpu")


def measure_on(device: torch.device) -> None:
    """Say what is measured from now on."""
    global _device
    _device = device


def folder(device_type: str | None = None) -> Path:
    """Return the folder of the figures of a type of device; default: that of this run."""
    kind = device_type or _device.type
    return FOLDER if kind == "cpu" else FOLDER / kind


def record(name: str, value: float) -> None:
    """Keep a figure, e.g. `record("stamp_224.vs_eager", 12.3)`."""
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number")
    _figures[name] = value


def holds(name: str, value: float) -> bool | None:
    """Whether a figure of this run keeps its bound; None if it has none, as on a GPU."""
    if name not in BOUNDS or _device.type != "cpu":
        return None
    sign, bound = BOUNDS[name]
    return value <= bound if sign == "<=" else value >= bound


def table(figures: dict[str, float]) -> list[str]:
    """Lines to print: figure, value, bound."""
    width = max(map(len, figures), default=0)
    lines = []
    for name, value in sorted(figures.items()):
        kept = holds(name, value)
        bound = "" if kept is None else " ".join(map(str, BOUNDS[name]))
        lines.append(f"{name:{width}} {value:9.3f}  {bound:8} {'MISSED' if kept is False else ''}")
    return [line.rstrip() for line in lines]


def write_summary() -> dict[str, float]:
    """Merge this run's figures into summary.json; return them."""
    if not _figures:
        return {}
    summary = folder() / "summary.json"
    before: dict[str, float] = json.loads(summary.read_text()) if summary.is_file() else {}
    summary.parent.mkdir(parents=True, exist_ok=True)
    write_file(summary, json.dumps(before | _figures, indent=2, sort_keys=True) + "\n")
    write_file(summary.with_name("machine.json"), json.dumps(machine(), indent=2) + "\n")
    return dict(_figures)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = build_info()
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    on_gpu = _device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(_device) if on_gpu else "CPU",
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": info["cpu_capability"],
        "gpus": info["gpus"],
        "torch": info["torch"],
        "pydetox": info["pydetox"],
        "python": info["python"],
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
