"""Workers that share one device: seconds per checkpoint of a scan with one, two and three."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.check_scan import scan_seconds
from pydetox.checkpoints import Provenance, save_checkpoint

from .library import random_model
from .recorder import Session

CHECKPOINTS, STEPS, CLASSES = 6, 50, 10


def measure(session: Session) -> None:
    """Record seconds per checkpoint, and how many times as fast several workers are."""
    folder = session.work / "sharing"
    shutil.rmtree(folder, ignore_errors=True)
    size = make_registry(session, folder / "registry")
    generator = np.random.default_rng(0)
    classes = 2 if session.tiny else CLASSES
    np.savez(
        folder / "images.npz",
        images=generator.integers(0, 256, (64, size, size, 3), dtype=np.uint8),
        class_names=np.array([f"thing {k}" for k in range(classes)]),
    )
    seconds: dict[int, float] = {}
    try:
        for workers in (1,) if session.tiny else (1, 2, 3):
            with session.attempt(f"sharing.workers{workers}"):
                seconds[workers] = scan(session, folder, workers)
                session.record(f"sharing.workers{workers}.s_per_checkpoint", seconds[workers])
                if 1 in seconds and workers > 1:
                    ratio = seconds[1] / seconds[workers]
                    session.record(f"sharing.workers{workers}.speedup", ratio)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_registry(session: Session, folder: Path) -> int:
    """Write checkpoints that differ, and return the side of their images."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    weights = model.storage_state_dict()
    for number in range(count_of(session)):
        weights["logit_scale"] += 0.01
        save_checkpoint(
            folder / f"{number}",
            weights,
            model_config=model.model_config,
            preprocess_config=None,
            provenance=Provenance(method="check-gpu, random weights"),
        )
    return model.image_size


def count_of(session: Session) -> int:
    """Return the number of checkpoints."""
    return 1 if session.tiny else CHECKPOINTS


def scan(session: Session, folder: Path, workers: int) -> float:
    """Return seconds per checkpoint, from the beginning of the first scan to the last record."""
    run = folder / f"run-{workers}"
    command = [sys.executable, "-m", "pydetox", "scan", str(folder / "registry")]
    command += ["--images", str(folder / "images.npz"), "--engine", "local"]
    command += ["--device", str(session.device), "--workers", str(workers), "--run", str(run)]
    command += ["--steps", "3" if session.tiny else str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 2):  # 2: no verdict, because there are no references
        raise RuntimeError(done.stderr[-400:])
    return scan_seconds(run) / count_of(session)
