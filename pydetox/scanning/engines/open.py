"""Choosing the engine that a configuration names."""

from __future__ import annotations

import os

from ...errors import UsageError
from ..config import ScannerConfig
from ..tasks import Engine, Notify

# On small models, more processes of fewer threads were faster. But each process holds two models.
CORES_PER_WORKER = 4


def open_engine(config: ScannerConfig, targets: int, notify: Notify) -> Engine:
    """Return the engine of a configuration, with at most as many workers as targets.

    Raises UsageError if the device does not exist, and EngineError if the cluster does not answer.
    """
    name = _engine(config, targets)
    if name == "inline":
        if config.timeout is not None:
            raise UsageError("the inline engine cannot keep a timeout; use the local engine")
        from .inline import InlineEngine

        return InlineEngine(config, _devices(config)[0], notify)
    if name == "ray":
        from .ray import RayEngine

        return RayEngine(config, targets, notify)
    from .local import LocalEngine

    workers, threads = share_out(config, targets)
    return LocalEngine(
        config, workers=workers, threads=threads, devices=_devices(config), notify=notify
    )


def share_out(config: ScannerConfig, targets: int) -> tuple[int, int]:
    """Return the number of workers on this machine and the number of threads of each.

    With Ray, this is the configured number of workers, or one; the cluster is not asked.
    """
    cores = len(os.sched_getaffinity(0))
    name = _engine(config, targets)
    if name != "local":
        workers = config.workers if name == "ray" else None
        return workers or 1, config.threads or cores
    devices = _devices(config)
    wanted = config.workers
    if wanted is None:
        on_cpu = devices == ["cpu"]
        wanted = max(1, cores // CORES_PER_WORKER) if on_cpu else len(devices)
    return max(1, min(wanted, targets)), config.threads or max(1, cores // wanted)


def _engine(config: ScannerConfig, targets: int) -> str:
    if config.engine != "auto":
        return config.engine
    alone = targets == 1 and config.timeout is None and config.workers in (None, 1)
    return "inline" if alone else "local"


def _devices(config: ScannerConfig) -> list[str]:
    if config.device == "cpu":
        return ["cpu"]
    from ...models.device import find_device

    device = find_device(config.device)
    if device.type == "cuda" and device.index is None:
        import torch

        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)]
