"""The demo's models for benchmarks, made once and kept under runs/bench/models/SEED."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydetox import training
from pydetox.atomic import write_file
from pydetox.data import ImageSet, load_digits
from pydetox.research import demo

FOLDER = Path("runs/bench/models")
NAMES = ("base", "clean", "backdoored")


def suspects(seed: int) -> dict[str, Path]:
    """Return the checkpoints by name.

    They are made when they are not there, or were made by other code.
    """
    folder = FOLDER / str(seed)
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (demo, training))
    made_by = hashlib.sha256(sources).hexdigest()
    stamp = folder / "made-by.txt"
    if stamp.is_file() and stamp.read_text().strip() == made_by:
        return {name: folder / name for name in NAMES}
    attacker, _, _ = splits(seed)
    paths = demo.make_suspects(attacker, demo.draw_attack(seed), folder, seed)
    write_file(stamp, f"{made_by}\n")
    return paths


def splits(seed: int) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return the images of the attacker, the defender and the test, as the demo shares them out."""
    attacker, defender, test = load_digits(32).split((0.5, 0.2, 0.3), seed=seed)
    return attacker, defender, test
