"""How long a scan will take, and how much memory: from one checkpoint and a few of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .config import ScannerConfig
    from .targets import Target


@dataclass(frozen=True)
class Estimate:
    """What a scan should take at most; searches that end early make it less.

    Attributes:
        seconds: Wall time of all targets, without calibration.
        seconds_per_step: Of the searches of all classes, on the checkpoint that was timed.
        timed_on: Its name.
        workers, threads: What it was computed for.
        memory: Bytes of the largest worker (see `Limits.memory`), by the sizes of files: those of
            half precision need twice as much for their weights.
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
