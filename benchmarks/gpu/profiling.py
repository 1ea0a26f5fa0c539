"""Where the time of a step goes: kernels by kind, launches, and how busy the device is."""

from __future__ import annotations

import json
import re

import torch
from torch.profiler import ProfilerActivity, profile

from pydetox.atomic import write_file

from .library import random_model, targeted_search
from .recorder import Session
from .steps import triggers_of
from .timing import once, wait

STEPS = 3
#: Kind of kernel and what its name contains; the first that fits counts.
KINDS = (
    ("pydetox", r"pydetox"),
    ("attention", r"flash|fmha|sdpa|attention|cudnn_generated"),
    ("matrix_products", r"gemm|cutlass|nvjet|cublas|xmma|splitK|addmm|\bmm\b|bmm"),
    ("normalisation", r"layer_?norm|GammaBeta"),
    ("copies", r"copy|Memcpy|CatArray|Memset"),
    ("elementwise", r"elementwise|vectorized|gelu|silu|add|mul"),
)


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel's name."""
    return next((kind for kind, names in KINDS if re.search(names, kernel, re.I)), "other")


def measure(session: Session) -> None:
    """Record microseconds per step by kind of kernel; the forty longest go to profile.json."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    step = targeted_search(model, triggers_of(session, 10), session.generator, precision="bfloat16")
    for _ in range(STEPS):
        step()
    whole = once(lambda: [step() for _ in range(STEPS)], session.device) / STEPS
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if session.gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        wait(session.device)
    rows = []
    for event in found.key_averages():
        on_device = "CUDA" in str(event.device_type)
        if session.gpu and not on_device:
            continue
        spent = event.self_device_time_total if session.gpu else event.self_cpu_time_total
        rows.append((float(spent) / STEPS, event.count / STEPS, str(event.key)))
    kinds: dict[str, float] = {}
    for microseconds, _, name in rows:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + microseconds
    for kind, microseconds in kinds.items():
        session.record(f"profile.{kind}_us_per_step", microseconds)
    total = sum(kinds.values())
    session.record("profile.all_us_per_step", total)
    session.record("profile.busy", total / 1e6 / whole)
    session.record("profile.kernels_per_step", sum(count for _, count, _ in rows))
    longest = [
        {"name": name[:160], "us_per_step": round(us, 1), "calls_per_step": count}
        for us, count, name in sorted(rows, reverse=True)[:40]
    ]
    device = torch.cuda.get_device_name(session.device) if session.gpu else "CPU"
    values = {"device": device, "kernels": longest}
    write_file(session.results.parent / "profile.json", json.dumps(values, indent=1) + "\n")
