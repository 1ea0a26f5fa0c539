"""How long a scan will take, and how much memory: from one checkpoint and a few of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, PydetoxError

if TYPE_CHECKING:
    from .config import ScannerConfig
    from .targets import Target

# Beside checkpoints: Python, torch and the images, and the activations of a step (see
# `inversion.search`, whose bound on a CPU this is).
_RUNTIME, _ACTIVATIONS = 1 << 29, 1 << 29


@dataclass(frozen=True)
class Estimate:
    """What a scan should take at most; searches that end early make it less.

    Attributes:
        seconds: Wall time of all targets, without calibration.
        seconds_per_step: Of the searches of all classes, on the checkpoint that was timed.
        timed_on: Its name.
        workers, threads: What it was computed for.
        memory: Bytes of the largest worker: two checkpoints of the largest size on the disk, the
            base if there is one, activations, and what Python and torch take.
    """

    seconds: float
    seconds_per_step: float
    timed_on: str
    workers: int
    threads: int
    memory: int


def estimate(config: ScannerConfig, targets: list[Target]) -> Estimate | None:
    """Time a few steps of the first target on the disk that can be read; None if there is none.

    Other targets are taken to need time in proportion to the size of their files, and those that
    are not on the disk as much as the one that was timed. Raises what all targets share: images,
    class names or a base that cannot be read.
    """
    from .engines import share_out
    from .worker import Worker

    sizes = {target.name: _size(target.path) for target in targets if target.problem is None}
    workers, threads = share_out(config, len(targets))
    worker = Worker(config, config.device, threads)
    largest = max((size or 0 for size in sizes.values()), default=0)
    base = 0 if config.base is None else _size_of_base(config)
    memory = 2 * largest + base + _RUNTIME + (_ACTIVATIONS if config.inversion else 0)
    for target in targets:
        size = sizes.get(target.name)
        if size is None or (config.max_size is not None and size > config.max_size):
            continue
        try:
            read, step = worker.time(target.reference)
        except CheckpointError:
            continue
        scale = sum((one or size) / size for one in sizes.values())
        each = read + config.steps * step
        return Estimate(scale * each / workers, step, target.name, workers, threads, memory)
    return None


def _size(path: str | None) -> int | None:
    if path is None:
        return None
    try:
        return Path(path).stat().st_size or None
    except OSError:
        return None


def _size_of_base(config: ScannerConfig) -> int:
    from .targets import resolve_weights

    try:
        return _size(str(resolve_weights(str(config.base), offline=True))) or 0
    except PydetoxError:
        return 0  # not downloaded yet
