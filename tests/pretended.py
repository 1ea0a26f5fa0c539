"""A pretended GPU: tensors that say they are on `cuda:0`, hold their values on the CPU, and tell.

    with PretendedGpu() as gpu:
        model.to("cuda")
        ...
    assert gpu.syncs == []

What a GPU would refuse, an operator on tensors of two devices, raises `MixedDevicesError`. Bytes
that are sent to the device are counted, and so is everything that makes the host wait for it:
values that are read, copies to the host, results whose size depends on values. Kernels are those of
the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

DEVICE = torch.device("cuda", 0)
# Whose results have a size that depends on values, or are values on the host.
_WAITING = frozenset(
    {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "_unique2",
        "unique_dim",
    }
)


class MixedDevicesError(RuntimeError):
    """An operator got tensors of two devices."""


class OnDevice(Tensor):
    """A tensor that says it is on the device. To C++ it is on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu", requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of a pretended GPU outlived it")

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendedGpu:
    """A context in which `cuda` is a device that any machine has.

    Attributes:
        sent: Bytes that went from the host to the device.
        syncs: Names of what made the host wait for the device, in order.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.syncs: list[str] = []
        self._modes = (_Operators(self), _Functions(self))

    def __enter__(self) -> PretendedGpu:
        # Module.to keeps parameters otherwise and lets them share the values of the new ones.
        self._overwrote = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrote)


def _is_gpu(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class _Functions(TorchFunctionMode):
    """What Python asks of devices: where a tensor is, moves, and new tensors on one."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu = gpu
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return DEVICE if isinstance(args[0], OnDevice) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return isinstance(args[0], OnDevice)
        if func is Tensor.cpu:
            return self._move(args[0], torch.device("cpu"))
        if func is Tensor.cuda:
            return self._move(args[0], DEVICE)
        if func is Tensor.numpy and isinstance(args[0], OnDevice):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            made = args[0].inner.new_tensor(*args[1:], **kwargs)
            self._gpu.sent += made.nbytes
            return _wrapped(made)
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            self._gpu.syncs.append("tolist")
            return args[0].inner.tolist()
        if func is Tensor.to:
            return self._to(args, kwargs)
        if _is_gpu(kwargs.get("device")):
            made = func(*args, **kwargs | {"device": "cpu"})
            if any(isinstance(one, OnDevice) for one in args) or isinstance(made, OnDevice):
                return made
            name = (resolve_name(func) or "").rpartition(".")[2]
            if name in ("tensor", "as_tensor"):  # values of the host
                self._gpu.sent += made.nbytes
            return _wrapped(made)
        if any(isinstance(one, OnDevice) for one in args) and kwargs.get("device") is not None:
            asked = torch.device(kwargs["device"])
            return self._move(func(*args, **kwargs | {"device": None}), asked)
        return func(*args, **kwargs)

    def _to(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, *rest = args
        place, left = kwargs.pop("device", None), []
        for value in rest:
            if isinstance(value, Tensor):
                # Within a mode a tensor of the pretended device says what it is to C++.
                place = DEVICE if isinstance(value, OnDevice) else value.device
                left.append(value.dtype)
            elif isinstance(value, str | torch.device):
                place = value
            elif value is not None:
                left.append(value)
        kwargs.pop("non_blocking", None)
        dtype = next((v for v in left if isinstance(v, torch.dtype)), kwargs.pop("dtype", None))
        copy = bool(kwargs.pop("copy", False))
        was = tensor
        if place is not None:
            tensor = self._move(tensor, torch.device(place))
        if dtype is not None and dtype != tensor.dtype:
            return (
                Tensor.to(tensor, dtype) if not isinstance(tensor, OnDevice) else tensor.type(dtype)
            )
        return tensor.clone() if copy and tensor is was else tensor

    def _move(self, tensor: Tensor, place: torch.device) -> Tensor:
        there = isinstance(tensor, OnDevice)
        if there == _is_gpu(place):
            return tensor
        if there:
            self._gpu.syncs.append("to the host")
            return _ToHost.apply(tensor)
        self._gpu.sent += tensor.nbytes
        return _ToDevice.apply(tensor)


def _wrapped(tensor: Tensor) -> OnDevice:
    wrapped = OnDevice(tensor.detach())
    return wrapped.requires_grad_() if tensor.requires_grad else wrapped


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnDevice(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.inner if isinstance(gradient, OnDevice) else gradient


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, OnDevice)
        return tensor.inner.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnDevice(gradient.detach().clone())


class _Operators(TorchDispatchMode):
    """What runs: on the values of the CPU, if all tensors are on one device."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu = gpu
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = [
            one
            for one in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(one, Tensor)
        ]
        there = [isinstance(one, OnDevice) for one in flat]
        name = func.overloadpacket.__name__
        if not any(there):
            return func(*args, **kwargs)
        if not all(there):
            if name == "copy_":
                return self._copy(args)
            # A number of the host is passed with the launch.
            hosts = [one for one in flat if not isinstance(one, OnDevice)]
            if any(one.ndim for one in hosts) or name.startswith("pydetox"):
                shapes = [(str(tuple(one.shape)), isinstance(one, OnDevice)) for one in flat]
                raise MixedDevicesError(f"{func}: tensors of two devices, on the GPU: {shapes}")
        indices = [one for one in flat[1:] if one.dtype in (torch.bool, torch.uint8)]
        if name in _WAITING or (name in ("index", "index_put_", "index_put") and indices):
            self._gpu.syncs.append(name)
        func_here = _ON_CPU.get(name, func)
        result = func_here(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            return result
        if name in _ON_CPU:
            return tree_map(lambda one: OnDevice(one) if isinstance(one, Tensor) else one, result)
        wrapped = tree_map(lambda one: OnDevice(one) if isinstance(one, Tensor) else one, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _copy(self, args: Any) -> Tensor:
        target, source = args[:2]
        if isinstance(target, OnDevice):
            self._gpu.sent += source.nbytes
            target.inner.copy_(source)
        else:
            self._gpu.syncs.append("to the host")
            target.copy_(source.inner)
        return target


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    mixed, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    empty = mixed.new_empty(0)
    return mixed, logsumexp, None, None, query.shape[2], key.shape[2], empty, empty, empty


def _flash_backward(gradient: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """given: query, key, value, mixed, logsumexp, and what a CPU has no use for."""
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, *given[:5], 0.0, False
    )


def _efficient(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Any, ...]:
    mixed, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    empty = mixed.new_empty(0)
    return mixed.transpose(1, 2), logsumexp, empty, empty, query.shape[1], key.shape[1]


def _efficient_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, _: Any, mixed: Tensor, *given: Any,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """given: two lists and two lengths that are not used, the logsumexp, and so on."""
    tensors = (one.transpose(1, 2) for one in (gradient, query, key, value, mixed))
    found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, given[4], 0.0, False
    )
    parts = [one.transpose(1, 2) for one in found]
    if shared_storage_dqdkdv:
        parts = list(torch.stack(parts, dim=2).unbind(2))
    return *parts, None


_aten = torch.ops.aten
#: Kernels that only a GPU has.
_ON_CPU = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_efficient_attention_forward": _efficient,
    "_efficient_attention_backward": _efficient_backward,
}
