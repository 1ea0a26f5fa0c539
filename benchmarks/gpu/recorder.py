"""Keeps figures as they are measured, and goes on after what fails."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import events


class DeviceLostError(Exception):
    """The device refuses all further work of this process, which has to be replaced."""


@dataclass
class Session:
    """What every stage is given.

    Attributes:
        device: What is measured.
        tiny: Sizes that a CPU does in a moment; nobody reads the figures.
        results: The file of events.
        work: Where the parts leave files for each other.
        figures: All figures so far, those of earlier processes too.
        generator, on_device: Random numbers of the CPU and of the device, seeded anew for each
            stage.
    """

    device: torch.device
    tiny: bool
    results: Path
    work: Path
    figures: dict[str, float | int | str] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.on_device = torch.Generator(self.device)
        self.figures.update(events.progress(events.read(self.results)).figures)

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def copy_rate(self) -> float:
        """Bytes per second that a large copy reads and writes, as `ceilings` measured it."""
        return float(self.figures.get("copy_bytes_per_second", math.nan))

    def record(self, name: str, value: float | int | str) -> None:
        """Keep a figure. One that is not finite is left out and said so."""
        if isinstance(value, float) and not math.isfinite(value):
            print(f"  {name}: {value}, not kept", flush=True)
            return
        self.figures[name] = value
        events.append(self.results, event="figure", name=name, value=value)
        print(
            f"  {name} {value:.6g}" if isinstance(value, float) else f"  {name} {value}", flush=True
        )

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Go on after what fails inside, with the reason as the figure `NAME.error`.

        Memory that has run out is given back first. Raises DeviceLostError for an error after which
        CUDA refuses everything.
        """
        try:
            yield
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a variant throws, the others still run)
            self.record(f"{name}.error", reason(error))
            traceback.print_exc()
            raise_if_lost(error)
        finally:
            if self.gpu and not _lost:
                torch.cuda.empty_cache()

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal numbers on the device."""
        numbers = torch.randn(*shape, generator=self.on_device, device=self.device)
        return numbers.to(dtype)

    def images(self, *shape: int) -> torch.Tensor:
        """Return uint8 noise on the device."""
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)
        return pixels.to(self.device)


_lost: list[str] = []


def raise_if_lost(error: BaseException) -> None:
    """Raise DeviceLostError if an error has taken the device's context with it."""
    sticky = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    # What a graph's capture does not allow fails, and the context lives on.
    harmless = isinstance(error, torch.OutOfMemoryError) or "captur" in str(error)
    if sticky and not harmless:
        _lost.append(reason(error))
        raise DeviceLostError(reason(error)) from error


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


@contextmanager
def stage(session: Session, name: str) -> Iterator[None]:
    """Note beginning and end of a stage, its time, its peak of memory, and why it failed."""
    start = time.monotonic()
    events.append(session.results, event="start", stage=name)
    print(f"== {name}", flush=True)
    session.generator.manual_seed(0)
    session.on_device.manual_seed(0)
    if session.gpu:
        torch.cuda.reset_peak_memory_stats()
    error = ""
    try:
        yield
    except Exception as caught:
        error = reason(caught)
        traceback.print_exc()
        if isinstance(caught, DeviceLostError):
            raise
        raise_if_lost(caught)
    finally:
        extra: dict[str, float | str] = {"error": error} if error else {}
        if session.gpu and not _lost:
            extra["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.empty_cache()
        seconds = round(time.monotonic() - start, 2)
        events.append(session.results, event="end", stage=name, seconds=seconds, **extra)
