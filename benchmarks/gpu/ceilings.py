"""What the device can do at best: bytes copied, products of large matrices, transfers."""

from __future__ import annotations

from functools import partial

import torch

from .recorder import Session
from .timing import device_seconds, paced_seconds


def measure(session: Session) -> None:
    """Record the ceilings that the other figures are compared with."""
    tiny = session.tiny
    session.record("copy_bytes_per_second", copy_rate(session, 1 << (22 if tiny else 31)))
    products(session, 128 if tiny else 8192)
    if session.gpu:
        transfers(session, 1 << (20 if tiny else 28))


def copy_rate(session: Session, size: int) -> float:
    """Return the bytes per second that a copy of `size` bytes reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=session.device).random_()
    target = torch.empty_like(source)
    call = partial(target.copy_, source)
    return 2 * size / device_seconds([call], session.device, tiny=session.tiny)


def products(session: Session, side: int) -> None:
    """Record the rate of square matrix products of random numbers, by precision."""
    forms = [("bfloat16", torch.bfloat16, "highest"), ("float32", torch.float32, "highest")]
    if session.gpu:
        forms.append(("tf32", torch.float32, "high"))
    for name, dtype, precision in forms:
        with session.attempt(f"matmul_{name}"):
            a, b = (session.randn(side, side, dtype=dtype) for _ in range(2))
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                seconds = paced_seconds(
                    partial(torch.matmul, a, b), session.device, tiny=session.tiny
                )
            finally:
                torch.set_float32_matmul_precision(before)
            session.record(f"matmul_{name}.tflops", 2 * side**3 / seconds / 1e12)


def transfers(session: Session, size: int) -> None:
    """Record the rate from the host's memory to the device's."""
    pageable = torch.empty(size, dtype=torch.uint8).random_()
    pinned = pageable.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=session.device)
    for name, source in (("pageable", pageable), ("pinned", pinned)):
        with session.attempt(f"to_device_{name}"):
            seconds = paced_seconds(
                partial(target.copy_, source, non_blocking=True), session.device
            )
            session.record(f"to_device_{name}.bytes_per_second", size / seconds)
