"""The memory that a worker needs, and the limits above which a checkpoint is skipped."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PydetoxError, UsageError

if TYPE_CHECKING:
    import torch

    from .config import ScannerConfig

# Beside checkpoints: Python, torch and the images, and the activations of a step (see
# `models.memory`, whose bound on a CPU this is). Pages of libraries, which all workers share, do
# not count.
_RUNTIME, _ACTIVATIONS = 1 << 29, 1 << 29


@dataclass(frozen=True)
class Limits:
    """The limits of a checkpoint that is scanned, in bytes.

    Attributes:
        max_size: The largest size of all its weights files together; None for no limit.
        max_memory: The most memory of the worker that scans it; None for no limit.
        beside: The memory that a worker needs beside the checkpoints.
    """

    max_size: int | None
    max_memory: int | None
    beside: int

    @classmethod
    def of(cls, config: ScannerConfig) -> Limits:
        """Return the limits of a configuration.

        The base counts twice: as a checkpoint, and as the model of searches in contrast to it.
        Raises UsageError if the budget is smaller than the memory needed beside checkpoints.
        """
        beside = _RUNTIME
        if config.inversion:
            beside += _ACTIVATIONS
        if config.base is not None:
            beside += (2 if config.inversion else 1) * _size_of_base(config)
        if config.max_memory is not None and beside >= config.max_memory:
            raise UsageError(
                f"a budget of {config.max_memory:,} bytes of memory (max_memory=), but a worker "
                f"needs {beside:,} beside the checkpoints"
            )
        return cls(config.max_size, config.max_memory, beside)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Limits:
        """Read back what `to_dict` returned."""
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def memory(self, size: int, parameters: int = 0) -> int:
        """Return the bytes that a worker needs for checkpoints of `size` bytes and `parameters`.

        A worker holds two checkpoints: it scans one, in float32, while it reads the next one.
        """
        return 2 * max(size, 4 * parameters) + self.beside

    def refusal(self, size: int, parameters: int = 0) -> str | None:
        """Return the reason why a checkpoint must be skipped, or None.

        parameters: The number of parameters; 0 as long as it is not known.
        """
        if self.max_size is not None and size > self.max_size:
            return f"{size:,} bytes, more than the limit of {self.max_size:,} (max_size=)"
        needed = self.memory(size, parameters)
        if self.max_memory is not None and needed > self.max_memory:
            return (
                f"needs about {needed:,} bytes of memory, more than the budget of "
                f"{self.max_memory:,} (max_memory=)"
            )
        return None


def return_freed(device: torch.device | None = None) -> None:
    """Return freed memory to the system, if the allocator supports this (glibc), and to a GPU.

    Otherwise, it keeps the pages of freed tensors, up to a whole checkpoint's, and places the next
    tensors elsewhere. What torch keeps of a GPU, other workers on that GPU cannot use.
    """
    if device is not None and device.type == "cuda":
        import torch  # the driver of a scan does without

        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def share_of_gpu(workers: int, devices: int) -> float:
    """Return the share of a GPU's memory that each worker may take, if workers share GPUs evenly.

    Each process also has a context of its own on the GPU, of some hundred MiB that torch does not
    count. They fit into the tenth that is left over.
    """
    together = -(-workers // devices)
    return 1.0 if together == 1 else 0.9 / together


def _size_of_base(config: ScannerConfig) -> int:
    from ..checkpoints import identify_checkpoint

    # An estimate is no reason to download a file.
    offline = config.offline or config.max_memory is None
    try:
        return identify_checkpoint(str(config.base), offline=offline).nbytes
    except PydetoxError:
        return 0  # The error appears when the file is read.
