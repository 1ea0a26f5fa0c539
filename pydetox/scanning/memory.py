"""What a worker needs of memory, and what is not scanned because it would need more."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PydetoxError, UsageError

if TYPE_CHECKING:
    from .config import ScannerConfig

# Beside checkpoints: Python, torch and the images, and the activations of a step (see
# `models.memory`, whose bound on a CPU this is). Pages of libraries, which all workers share, do
# not count.
_RUNTIME, _ACTIVATIONS = 1 << 29, 1 << 29


@dataclass(frozen=True)
class Limits:
    """What a checkpoint must not exceed to be scanned; all in bytes.

    Attributes:
        max_size: Of all its weights files together; None for no limit.
        max_memory: Of the worker that scans it; None for no limit.
        beside: What a worker needs beside the checkpoints.
    """

    max_size: int | None
    max_memory: int | None
    beside: int

    @classmethod
    def of(cls, config: ScannerConfig) -> Limits:
        """Return the limits of a configuration.

        The base counts twice: as it was read, and as the model that contrasts are searched with.
        Raises UsageError when the budget does not even hold what is needed beside checkpoints.
        """
        beside = _RUNTIME
        if config.inversion:
            beside += _ACTIVATIONS
        if config.base is not None:
            beside += (2 if config.inversion else 1) * _size_of_base(config)
        if config.max_memory is not None and beside >= config.max_memory:
            raise UsageError(
                f"a budget of {config.max_memory:,} bytes of memory (--max-memory), but a worker "
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
        """Return what a worker needs for checkpoints of up to `size` bytes and `parameters`.

        Two of them: one is scanned, in float32, while the next one is read.
        """
        return 2 * max(size, 4 * parameters) + self.beside

    def refusal(self, size: int, parameters: int = 0) -> str | None:
        """Say why a checkpoint is not to be scanned, or return None.

        parameters: 0 while they are not known.
        """
        if self.max_size is not None and size > self.max_size:
            return f"{size:,} bytes, more than the limit of {self.max_size:,} (--max-size)"
        needed = self.memory(size, parameters)
        if self.max_memory is not None and needed > self.max_memory:
            return (
                f"needs about {needed:,} bytes of memory, more than the budget of "
                f"{self.max_memory:,} (--max-memory)"
            )
        return None


def return_freed() -> None:
    """Give memory that was freed back to the system, where the allocator can be told to (glibc).

    It keeps the pages of freed tensors otherwise, up to a whole checkpoint's, while the next ones
    are put elsewhere.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _size_of_base(config: ScannerConfig) -> int:
    from ..checkpoints import identify_checkpoint

    # Nothing is downloaded for a figure that nobody asked for.
    offline = config.offline or config.max_memory is None
    try:
        return identify_checkpoint(str(config.base), offline=offline).nbytes
    except PydetoxError:
        return 0  # reading it will say what is wrong
