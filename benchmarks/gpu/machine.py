"""What the figures were measured on, found without pydetox."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .bundle import Manifest
from .processes import ROOT
from .summary import Value

# Run by the interpreter that is going to measure, with the device as its argument.
_TORCH = """
import json, sys, torch
gpu = torch.cuda.is_available()
found = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
if gpu:
    p = torch.cuda.get_device_properties(sys.argv[1] if "cuda" in sys.argv[1] else 0)
    found |= {"gpu": p.name, "capability": f"{p.major}.{p.minor}",
              "multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size,
              "memory_gib": round(p.total_memory / 2**30, 2),
              "cudnn": str(torch.backends.cudnn.version())}
print(json.dumps(found))
"""


def output(command: Sequence[str], timeout: float = 60.0) -> str:
    """Return what a command prints, or an empty string where it cannot run or fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def torch_facts(device: str) -> dict[str, Value]:
    """Return what torch says: version, CUDA, and a GPU's name, capability and memory.

    device: `cuda`, `cuda:N` or `cpu`; of a CPU's machine, the first GPU is described.
    An empty dict where torch cannot be imported, or where there is no such GPU.
    """
    text = output([sys.executable, "-c", _TORCH, device], timeout=180)
    facts: dict[str, Value] = json.loads(text.splitlines()[-1]) if text else {}
    return facts


def facts(device: str, torch: dict[str, Value], manifest: Manifest | None) -> dict[str, Value]:
    """Return the summary's head: `device`, `device_type`, versions, date, commit."""
    kind = device.partition(":")[0]
    found: dict[str, Value] = {
        "device_type": kind,
        "device": str(torch.get("gpu", "GPU")) if kind == "cuda" else f"CPU: {cpu_name()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit() or (manifest.commit if manifest else "unknown"),
        **{k: v for k, v in torch.items() if kind == "cuda" or k in ("torch", "cuda")},
    }
    if kind == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = (output(query).splitlines() or ["unknown"])[0]
        release = re.search(r"release ([\d.]+), V([\d.]+)", output(["nvcc", "--version"]))
        found["nvcc"] = release[2] if release else "none"
        for tool in ("compute-sanitizer", "ncu"):
            found[tool] = "found" if shutil.which(tool) else "none"
    found.pop("gpu", None)
    return found


def commit() -> str:
    """Return the commit, with `+` where files differ from it; empty outside of a git clone."""
    head = output(["git", "rev-parse", "--short=12", "HEAD"])
    changed = output(["git", "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if head and changed else "")


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
