"""The precision of float32 matrix products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_products(device: torch.device) -> Iterator[bool]:
    """Run float32 products on a GPU in TF32 within this block.

    Training and prediction use it; searches do not. It yields whether products run in TF32. Nothing
    changes on a CPU. The setting concerns the whole process, and is restored at the end.
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
