"""A recorder of steps for the CPU: what CUDA's stream capture does to launches, done to operators.

A recording keeps every call of an operator with its arguments: numbers as they are, tensors as
memory. A replay makes the same calls on the same memory, and writes every result where the first
one lay. Whatever a step takes from the host is thus frozen, as in a CUDA graph. While a step is
recorded, nothing happens: all that it writes is put back. What the host waits for raises, as under
a capture: operators such as `nonzero`, an index that is a mask, and values that Python reads
(`tolist`, `numpy`, `cpu`), which on a CPU call no operator at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

#: Operators whose results the host waits for.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
)
#: Operators that wait if an index is a mask, whose true values must be counted.
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
#: Methods of tensors that give the host their values.
READING = ("tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__int__", "__float__")
_MASKS = (torch.bool, torch.uint8)
_READING = {getattr(Tensor, name): name for name in READING}


class CaptureError(RuntimeError):
    """An operator that no graph can hold."""


@dataclass(eq=False)
class Call:
    """One call of an operator. Tensors among the arguments are the ones that were given."""

    operator: Any
    arguments: list[Any]
    structure: Any
    results: list[Tensor]


class RecordedStep(TorchDispatchMode):
    """The calls of what runs within this context.

    Attributes:
        calls: The calls, in order.
        signature: The calls as plain values. Memory from before is named by its address, memory of
            results by the number of the call that made it. Two steps with equal signatures give a
            device the same launches, up to the addresses of what they allocate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.signature: list[Any] = []
        self._made: dict[int, str] = {}  # storages of results
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # storages from before: whole and a copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            raise CaptureError(f"{func}: operation not permitted when a stream is captured")
        leaves, structure = tree_flatten((args, kwargs or {}))
        if func.overloadpacket.__name__ in INDEXING:
            masks = [one for one in args[1] if one is not None and one.dtype in _MASKS]
            if masks:
                raise CaptureError(f"{func}: a mask as index, when a stream is captured")
        for leaf in leaves:
            if isinstance(leaf, Tensor) and _storage(leaf) not in self._made:
                self._keep(leaf)
        described = [self._describe(leaf) for leaf in leaves]
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for leaf in results:
            known = _storage(leaf) in self._made or _storage(leaf) in self._kept
            if not known:
                self._made[_storage(leaf)] = f"call {len(self.calls)}"
        self.calls.append(Call(func, leaves, structure, results))
        self.signature.append((str(func), described, [self._describe(leaf) for leaf in results]))
        return result

    def _keep(self, tensor: Tensor) -> None:
        if _storage(tensor) not in self._kept:
            storage = _on_cpu(tensor).untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._kept[_storage(tensor)] = (whole, whole.clone())

    def _describe(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        place = self._made.get(_storage(leaf), _storage(leaf))
        leaf = _on_cpu(leaf)
        return (place, leaf.storage_offset(), tuple(leaf.shape), leaf.stride(), str(leaf.dtype))

    def undo(self) -> None:
        """Put back everything from before that was written."""
        for whole, copy in self._kept.values():
            if not torch.equal(whole, copy):
                whole.copy_(copy)

    def replay(self) -> None:
        """Make all calls again, on the memory of the recording."""
        # What was recorded is below the level at which a pretended GPU sees devices.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for call in self.calls:
                args, kwargs = tree_unflatten(call.arguments, call.structure)
                found = call.operator(*args, **kwargs)
                again = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
                for old, new in zip(call.results, again, strict=True):
                    if _storage(old) != _storage(new):
                        old.detach().copy_(new.detach())


class _NoReading(TorchFunctionMode):
    """Refuses methods that read values on the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            raise CaptureError(
                f"Tensor.{_READING[func]}: the host reads a captured stream's result"
            )
        return func(*args, **(kwargs or {}))


class OperatorRecorder:
    """A recorder for `pydetox.inversion.graph`."""

    def __init__(self) -> None:
        self.recordings: list[RecordedStep] = []

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> RecordedStep:
        step = RecordedStep()
        try:
            with step, _NoReading():
                work()
        finally:
            step.undo()
        self.recordings.append(step)
        return step


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return the tensor that holds the values; of a pretended GPU, the one within."""
    inner = getattr(tensor, "inner", None)
    return inner if isinstance(inner, Tensor) else tensor


def _storage(tensor: Tensor) -> int:
    return _on_cpu(tensor).untyped_storage()._cdata
