"""The number of images that a device takes at once, and fewer of them if its memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import DeviceMemoryError, is_out_of_memory, one_line

T = TypeVar("T")

# Bytes that the activations of one pass may take on a CPU. Large batches gain nothing there, and a
# worker of a scan has to do with two checkpoints and a gigabyte. A constant, so that the size of a
# batch, and with it the rounding of products, is the same from run to run; only a host that has
# hardly any memory left gets less.
_ON_CPU = 1 << 29
# The shares of free memory that activations may take. What they take is an estimate, and libraries
# of matrix products, gradients and the next checkpoint want some, too.
_SHARE_OF_HOST, _SHARE_OF_GPU = 0.25, 0.6


def activation_bytes(device: torch.device) -> int:
    """Return how many bytes the activations of one pass through a tower may take."""
    if device.type == "cuda":
        return int(_SHARE_OF_GPU * _free_on_gpu(device))
    available = _available_on_host()
    return _ON_CPU if available is None else min(_ON_CPU, int(_SHARE_OF_HOST * available))


def images_at_once(bytes_per_image: int, device: torch.device) -> int:
    """Return how many images the memory for activations holds, at least one.

    On a GPU it is a power of two, because the free memory differs from run to run. Another process
    that takes or returns memory then hardly ever changes the size of a batch, and with it the
    rounding.
    """
    count = max(1, activation_bytes(device) // max(1, bytes_per_image))
    return count if device.type == "cpu" else 1 << (count.bit_length() - 1)


class Batching:
    """The number of images that go through a tower at once, halved whenever memory runs out.

    Attributes:
        count: The number of images at once, at least 1.
        halved: The number of times that memory has run out.
    """

    def __init__(
        self, count: int, device: torch.device, name: str, *, divisible: bool = True
    ) -> None:
        """Begin with `count` items at once.

        device: The device of the work. name: The name of the model or the work, for messages.
        divisible: Whether the work can be done with fewer items at once.
        """
        self.count, self.halved = count, 0
        self._device, self._name, self._divisible = device, name, divisible

    def run(self, work: Callable[[int], T]) -> T:
        """Return work(count), called again with half as many images each time memory runs out.

        work: A function that can start over: it writes again what a failed call has written.
        Raises DeviceMemoryError if not even one image at a time fits.
        """
        while True:
            try:
                return work(self.count)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = one_line(str(error).partition("\n")[0])
            # Out here the error is gone, and with its traceback the tensors of the failed call.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if self.count == 1 or not self._divisible:
                how = "even with one at a time"
                if not self._divisible:
                    how = f"with a batch of {self.count}, which cannot be split"
                raise DeviceMemoryError(
                    f"{self._name}: out of memory on {self._device} {how} ({said}); expected a "
                    "device with more free memory"
                )
            self.count //= 2
            self.halved += 1

    def over(self, items: int, work: Callable[[slice], T]) -> Iterator[T]:
        """Yield work(part) for parts of 0..items-1, in order, of at most `count` items each.

        work: As for `run`. Raises DeviceMemoryError as `run` does.
        """
        first = 0
        while first < items:
            start = first

            def part_of(at_once: int, start: int = start) -> tuple[int, T]:
                part = slice(start, min(start + at_once, items))
                return part.stop, work(part)

            first, result = self.run(part_of)
            yield result

    def describe(self) -> str:
        """Return the number of images at once in words, for a report."""
        times = "" if not self.halved else f" (halved {self.halved} times: memory ran out)"
        return f"at most {self.count} images at once{times}"


def _free_on_gpu(device: torch.device) -> int:
    """Return the bytes that tensors of this process can still take on a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    # A caller may have limited the process to a share (`set_per_process_memory_fraction`).
    own = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return max(0, min(free, own)) + reserved - allocated


def _available_on_host() -> int | None:
    """Return the bytes that the system can give without swapping; None where it does not say."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None
