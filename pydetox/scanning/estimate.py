"""Estimating the time and the memory of a scan, from a few steps on one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .config import ScannerConfig
    from .targets import Target


@dataclass(frozen=True)
class Estimate:
    """The most that a scan should take. Searches that end early make it less.

    Attributes:
        seconds: The wall time of all targets in seconds, without calibration.
        seconds_per_step: The time of one step of the searches of all classes, on the timed
            checkpoint.
        timed_on: The name of the timed checkpoint.
        workers, threads: The numbers of workers and of their threads that this is computed for.
        memory: The bytes of the largest worker (see `Limits.memory`). They are computed from the
            sizes of files; weights of half precision need twice as much.
    """

    seconds: float
    seconds_per_step: float
    timed_on: str
    workers: int
    threads: int
    memory: int


def estimate(config: ScannerConfig, targets: list[Target]) -> Estimate | None:
    """Time a few steps of the first readable target on the disk; None if there is none.

    The estimate assumes that targets need time in proportion to the size of their files, and that
    targets which are not on the disk need as much as the timed one. It raises errors that concern
    all targets: images, class names or a base that cannot be read.
    """
    from .engines import share_out
    from .memory import Limits
    from .worker import Worker

    sizes = {target.name: target.size() for target in targets if target.problem is None}
    workers, threads = share_out(config, len(targets))
    worker = Worker(config, config.device, threads)
    limits = Limits.of(config)
    scanned = [size for size in sizes.values() if size and limits.refusal(size) is None]
    memory = limits.memory(max(scanned, default=0))
    for target in targets:
        size = sizes.get(target.name)
        if not size or limits.refusal(size) is not None:
            continue
        try:
            read, step = worker.time(target.reference)
        except CheckpointError:
            continue
        scale = sum((one or size) / size for one in sizes.values())
        each = read + config.steps * step
        return Estimate(scale * each / workers, step, target.name, workers, threads, memory)
    return None
