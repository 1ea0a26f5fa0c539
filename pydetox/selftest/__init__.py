"""`pydetox doctor --selftest`: every operator on every device, against a float64 reference.

This is the command that proves a build on a GPU. A case passes when its error against float64 is at
most twice that of plain PyTorch in the same dtype, plus the rounding of the result and of the
reference itself. Attention, which is PyTorch's own, may have four times the error of its plain form
on the CPU: its kernels on a GPU add up in other orders.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .operators import cases

_REPEATS = 3
# The error of the float64 reference itself, which sums a million terms.
_TRUTH = 1e-12


@dataclass(frozen=True)
class Outcome:
    """The result of a case.

    `error` and `bound` are the largest deviation from float64 that was found and that is allowed,
    both relative to the largest value of the float64 result.
    """

    operator: str
    what: str
    dtype: str
    device: str
    error: float
    bound: float
    bytes: int
    gigabytes_per_second: float
    passed: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields under their own names, ready for JSON."""
        return asdict(self)


def selftest(devices: Sequence[torch.device] | None = None) -> Iterator[Outcome]:
    """Run all cases, by default on the CPU and on every GPU that torch sees."""
    if devices is None:
        gpus = range(torch.cuda.device_count() if ops.cuda_library_loaded() else 0)
        devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in gpus)]
    for case in cases():
        truth = [t.double() for t in case.plain(*_convert(case.inputs, torch.float64))]
        scale = max([float(t.abs().max()) for t in truth if t.numel()], default=1.0) or 1.0
        plain = _error([t.cpu() for t in case.plain(*case.inputs)], truth, scale)
        bound = max(case.allowed * plain + torch.finfo(case.dtype).eps / 2, _TRUTH)
        for device in devices:
            inputs = _convert(case.inputs, device)
            seconds = []
            for _ in range(_REPEATS + 1):
                _wait(device)
                start = time.perf_counter()
                results = case.run(*inputs)
                _wait(device)
                seconds.append(time.perf_counter() - start)
            error = _error([t.cpu() for t in results], truth, scale)
            yield Outcome(
                operator=case.operator,
                what=case.what,
                dtype=str(case.dtype).removeprefix("torch."),
                device=str(device),
                error=error,
                bound=bound,
                bytes=case.moved,
                gigabytes_per_second=case.moved / min(seconds[1:]) / 1e9,
                passed=error <= bound,  # an error that is not a number does not pass
                note=case.note(device),
            )


def _convert(inputs: Any, to: torch.dtype | torch.device) -> Any:
    """Move tensors to a device, or floating-point ones to a dtype."""
    if isinstance(inputs, Tensor):
        whole = isinstance(to, torch.dtype) and not inputs.is_floating_point()
        return inputs if whole else inputs.to(to)
    return type(inputs)(_convert(one, to) for one in inputs)


def _error(found: Sequence[Tensor], truth: Sequence[Tensor], scale: float) -> float:
    errors = [(a.double() - b).abs().max() for a, b in zip(found, truth, strict=True) if b.numel()]
    return float(torch.stack(errors).max()) / scale


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
