"""The precision of float32 matrix products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_products(device: torch.device) -> Iterator[bool]:
    """Let float32 products on a GPU run in TF32 here: training and prediction, not searches.

    Yields whether they do; on a CPU nothing changes. The setting is the process's, and is put back.
    """
    if device.type != "cuda":
        yield False
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield True
    finally:
        torch.set_float32_matmul_precision(before)
