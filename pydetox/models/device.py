"""Devices by name."""

from __future__ import annotations

import torch

from ..errors import UsageError


def find_device(name: str) -> torch.device:
    """Return the device; UsageError if there is none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}; expected cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"device {name!r}: torch sees {count} GPUs here")
    return device
