"""Scan a folder of checkpoints, resume the scan, and read its results again.

The folder holds a base, two harmless variants of it, and a file that would run a command if it were
unpickled. The models are not trained and the search has a handful of steps, because the example is
about the scan and not about the verdicts. These are `inconclusive`, and the reason says why.

    python examples/scan_registry.py
"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import torch

from pydetox.checkpoints import Provenance, save_checkpoint
from pydetox.models import OpenClipModel
from pydetox.research.demo import MINI_CLIP
from pydetox.scanning import Scanner, ScannerConfig
from pydetox.scanning.runs import load_run


class Hostile:
    """A pickle of this object asks whoever loads it to run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo this must never run",)


def fill(registry: Path) -> None:
    """Write three models and a hostile file."""
    base = OpenClipModel.from_config(MINI_CLIP, seed=0, name="base")
    generator = torch.Generator().manual_seed(0)
    for name, noise in (("base", 0.0), ("one", 1e-4), ("two", 1e-4)):
        weights = {
            key: value + noise * torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else value
            for key, value in base.storage_state_dict().items()
        }
        save_checkpoint(
            registry / name,
            weights,
            model_config=base.model_config,
            preprocess_config=None,
            provenance=Provenance(method="random weights", seeds={"model": 0}),
        )
    (registry / "hostile.pt").write_bytes(pickle.dumps(Hostile()))


def main() -> None:
    """Scan the folder twice; the second time nothing is left to do."""
    with tempfile.TemporaryDirectory() as folder:
        registry, run = Path(folder) / "registry", Path(folder) / "run"
        fill(registry)
        config = ScannerConfig(
            images="digits",
            max_images=60,
            base=str(registry / "base"),
            references=2,
            steps=10,
            timeout=300,
        )
        for record in Scanner(config, run=run).scan([registry]):
            print(f"{Path(record.name).name}: {record.verdict}: {record.reason}")

        again = list(Scanner(config, run=run).scan([registry]))
        print(f"resumed: {sum(record.resumed for record in again)} of {len(again)}")
        print(f"read from the run folder: {len(load_run(run).records)} results")


if __name__ == "__main__":
    main()
