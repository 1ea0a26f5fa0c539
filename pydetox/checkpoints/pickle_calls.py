"""What the calls in a pickle make: tensors, dictionaries, or objects that stay opaque.

Every call that a weight can come from, or that can change one, is modelled with all of its
arguments, after ``torch/_utils.py`` and ``torch/_tensor.py``; arguments with another meaning there
than here are refused. Whatever else an allowed name makes is an
:class:`~pydetox.checkpoints.pickle_values.Opaque`, of which no weight is ever read.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final

from pydetox.checkpoints.index import (
    ITEM_SIZES,
    TensorEntry,
    check_extents,
    check_view,
    quote,
)
from pydetox.checkpoints.pickle_globals import DTYPES, OTHER_STORAGES, STORAGES, Global
from pydetox.checkpoints.pickle_values import (
    MAPPING_KINDS,
    Mapping,
    Opaque,
    PickledTensor,
    Storage,
    describe,
)
from pydetox.errors import CheckpointError, UnsafeCheckpointError

_UTILS = "torch._utils."
_TENSORS: Final = {
    f"{_UTILS}_rebuild_tensor": range(4, 5),
    f"{_UTILS}_rebuild_tensor_v2": range(6, 8),
    f"{_UTILS}_rebuild_tensor_v3": range(7, 9),
}
_PARAMETERS: Final = {f"{_UTILS}_rebuild_parameter": 3, f"{_UTILS}_rebuild_parameter_with_state": 4}
_FROM_TYPE: Final = frozenset(
    {"torch._tensor._rebuild_from_type_v2", "torch.tensor._rebuild_from_type_v2"}
)
# Functions that `_rebuild_from_type_v2` may call: each makes a new tensor.
_NEW_TENSORS: Final = frozenset(
    {f"{_UTILS}_rebuild_qtensor", f"{_UTILS}_rebuild_sparse_tensor"}
    | {f"{_UTILS}_rebuild_nested_tensor", f"{_UTILS}_rebuild_meta_tensor_no_storage"}
)
_TENSOR_CLASSES: Final = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
#: Attributes of a tensor whose assignment changes the tensor, in any version of torch.
TENSOR_FIELDS: Final = frozenset(
    """
    H T _backward_hooks _base _cdata _grad _grad_fn _has_symbolic_sizes_strides
    _post_accumulate_grad_hooks _python_dispatch _version data device dtype fake_device grad
    grad_dtype grad_fn imag is_cpu is_cuda is_hpu is_ipu is_leaf is_maia is_meta is_mkldnn is_mps
    is_mtia is_nested is_ort is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu itemsize
    layout mH mT name names nbytes ndim output_nr real requires_grad retains_grad shape volatile
    """.split()  # noqa: SIM905
)
_REAL: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
_COMPLEX: Final = frozenset({"complex64", "complex128"})
_SIGNED: Final = frozenset({"int8", "int16", "int32", "int64"})
_FLOAT8: Final = frozenset({name for name in ITEM_SIZES if name.startswith("float8")})
# "meta" leaves the weights out where nobody names another place; anything else is a device.
_LOCATION = re.compile(r"(?!meta)[a-z][a-z0-9_]*(:[0-9]{1,4})?")
_LATIN1: Final = frozenset({"latin1", "latin-1"})


class Caller:
    """Carries out the calls of one pickle.

    Args:
        budget: Elements that calls may copy, all together.
        legacy: Storages are referred to as torch before 1.6 did.

    Attributes:
        storages: Key to storage, in the order of their first use.
    """

    def __init__(self, budget: int, *, legacy: bool) -> None:
        self.storages: dict[str, Storage] = {}
        self._budget = budget
        self._legacy = legacy

    def call(self, function: Global, arguments: tuple[object, ...]) -> object:
        """``function(*arguments)``."""
        name = function.name
        if name in STORAGES or name in OTHER_STORAGES or name in DTYPES:
            raise CheckpointError("its pickle is damaged: it calls something that is no function")
        if name in _TENSORS:
            return _tensor(name, arguments)
        if name in _PARAMETERS:
            return _parameter(name, arguments)
        if name in _FROM_TYPE:
            return self._from_type(arguments)
        if name == "torch.nn.parameter.Parameter":
            return _new_parameter(arguments)
        if name in MAPPING_KINDS:
            return self._mapping(name, arguments)
        if name == "copyreg._reconstructor":
            return _reconstructed(arguments)
        if name == "_codecs.encode":
            return _encoded(arguments)
        if name == "builtins.str" and len(arguments) == 1 and type(arguments[0]) is str:
            return arguments[0]
        return Opaque(name, function.known)

    def create(self, made_from: Global, arguments: tuple[object, ...]) -> object:
        """``made_from.__new__(made_from, *arguments)``."""
        name = made_from.name
        if name in MAPPING_KINDS:
            return Mapping(name)  # `__new__` of a dictionary looks at no argument
        if name == "torch.nn.parameter.Parameter":
            return _new_parameter(arguments)
        if name == "builtins.str" and len(arguments) == 1 and type(arguments[0]) is str:
            return arguments[0]
        return Opaque(name, made_from.known)

    def storage(self, identity: object) -> Storage:
        """Describe the record that a persistent id names.

        It has the form ``("storage", storage type, key, location, number of elements)``; before
        torch 1.6 the view of another storage comes last, or ``None``.
        """
        length = 6 if self._legacy else 5
        if not isinstance(identity, tuple) or len(identity) != length or identity[0] != "storage":
            if self._legacy and isinstance(identity, tuple) and identity[:1] == ("module",):
                raise CheckpointError(
                    "holds a whole module and its source code. Save the weights alone where you "
                    "trust the file: torch.save(torch.load(FILE, weights_only=False).state_dict(), "
                    "NEW_FILE)"
                )
            raise CheckpointError("its pickle is damaged: an external reference that is no storage")
        _, kind, key, location, count, *view = identity
        name = kind.name if isinstance(kind, Global) else ""
        if name not in STORAGES and name not in OTHER_STORAGES:
            found = quote(name) if name else "something else"
            raise CheckpointError(f"holds a storage of the unsupported type {found}")
        if type(key) is not str or type(count) is not int or count < 0:
            raise CheckpointError("its pickle is damaged: a storage without a key or size")
        if type(location) is not str or not _LOCATION.fullmatch(location):
            raise CheckpointError(
                f"record {quote('data/' + key)}: its device is {quote(location)}, expected such as "
                "'cpu' or 'cuda:0'"
            )
        if view and view[0] is not None:
            raise CheckpointError(
                "holds a storage that is a part of another one, as torch before 0.4 wrote them"
            )
        dtype = STORAGES.get(name)
        item = OTHER_STORAGES[name] if dtype is None else ITEM_SIZES[dtype]
        return self._same(Storage(key, dtype, item, count))

    def _same(self, storage: Storage) -> Storage:
        """Check that one record is always described in the same way: torch keeps the first."""
        first = self.storages.setdefault(storage.key, storage)
        if first != storage:
            raise UnsafeCheckpointError(
                f"record {quote('data/' + storage.key)}: is described in two ways "
                f"({first.count} of {first.dtype}, {storage.count} of {storage.dtype})"
            )
        return first

    def _from_type(self, arguments: tuple[object, ...]) -> object:
        """``_rebuild_from_type_v2(function, class, arguments, state)``."""
        if len(arguments) != 4:
            raise CheckpointError("its pickle is damaged: a tensor without its class")
        function, kind, inner, state = arguments
        if (
            not isinstance(function, Global)
            or not isinstance(kind, Global)
            or not isinstance(inner, tuple)
            or not (
                function.name in _TENSORS
                or function.name in _PARAMETERS
                or function.name in _NEW_TENSORS
            )
        ):
            raise CheckpointError(
                "its pickle is damaged: a tensor that is made by no tensor's call"
            )
        made = self.call(function, inner)
        check_state(state, "a tensor")
        if kind.name in _TENSOR_CLASSES:
            return made
        return Opaque(kind.name, kind.known)

    def _mapping(self, kind: str, arguments: tuple[object, ...]) -> Mapping:
        """A dictionary made by a call: empty, or a copy of another one or of a list of pairs."""
        made = Mapping(kind)
        if kind == "collections.defaultdict":
            arguments = arguments[1:]  # the first makes values that are missing
        if not arguments:
            return made
        content = arguments[0]
        pairs: list[tuple[object, object]] = []
        if isinstance(content, Mapping):
            pairs = content.pairs
        elif isinstance(content, (list, tuple)) and kind != "collections.Counter":
            for item in content:
                if not isinstance(item, (list, tuple)) or len(item) != 2:
                    raise CheckpointError("its pickle is damaged: a dictionary of something else")
                pairs.append((item[0], item[1]))
        else:
            raise CheckpointError("its pickle is damaged: a dictionary of something else")
        self._budget -= len(pairs)
        if len(arguments) > 1 or self._budget < 0:
            raise UnsafeCheckpointError(
                "its pickle copies dictionaries, more often than a checkpoint needs"
            )
        made.pairs.extend(pairs)
        return made


def check_state(state: object, of: str) -> None:
    """Refuse attributes that change what they are set on, or that stand in for its methods.

    Args:
        state: What is set: a dictionary, or a pair of such.
        of: Names what it is set on.
    """
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for part in parts:
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise CheckpointError(f"its pickle is damaged: the state of {of} is {describe(part)}")
        for key, value in part.pairs:
            method = type(key) is str and hasattr(OrderedDict, key)
            if type(key) is not str or key.startswith("__") or key in TENSOR_FIELDS or method:
                shown = quote(key) if type(key) is str else describe(key)
                raise UnsafeCheckpointError(
                    f"its pickle sets the attribute {shown} of {of}, which changes what it holds"
                )
            if isinstance(value, Global) and value.name not in DTYPES:
                raise UnsafeCheckpointError(
                    f"its pickle sets the attribute {quote(key)} of {of} to {describe(value)}, "
                    "which may take the place of a method"
                )


def _reconstructed(arguments: tuple[object, ...]) -> Opaque:
    """``copyreg._reconstructor(class, base, state)``: how protocols 0 and 1 make objects."""
    kind = arguments[0] if len(arguments) == 3 else None
    base = arguments[1] if len(arguments) == 3 else None
    if not isinstance(kind, Global) or not isinstance(base, Global):
        raise CheckpointError(
            "its pickle is damaged: it creates an object of something that is no class"
        )
    if kind.name in MAPPING_KINDS or kind.name.startswith("torch."):
        raise CheckpointError(f"its pickle makes {quote(kind.name)} in a way of protocol 0")
    return Opaque(kind.name, kind.known)


def _encoded(arguments: tuple[object, ...]) -> object:
    """``_codecs.encode(text, "latin1")``: how protocols before 3 write bytes."""
    text, encoding = arguments if len(arguments) == 2 else (None, None)
    if type(text) is str and type(encoding) is str and encoding in _LATIN1:
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            raise CheckpointError("its pickle is damaged: bytes that are none") from None
    return Opaque("_codecs.encode")


def _tensor(name: str, arguments: tuple[object, ...]) -> object:
    """``_rebuild_tensor…(storage, offset, shape, strides, requires_grad, hooks, …)``."""
    if len(arguments) not in _TENSORS[name] or not isinstance(arguments[0], Storage):
        raise CheckpointError("its pickle is damaged: a tensor without a storage")
    storage = arguments[0]
    label = f"a tensor of record {quote('data/' + storage.key)}"
    if storage.dtype is None:
        raise CheckpointError(f"{label}: is quantised, but described as a plain tensor")
    dtype = storage.dtype
    extra = arguments[6:]
    if name.endswith("_v3"):
        kind = arguments[6]
        if not isinstance(kind, Global) or kind.name not in DTYPES:
            raise CheckpointError("holds a tensor of an unsupported dtype")
        dtype, extra = DTYPES[kind.name], arguments[7:]
    if len(arguments) > 4:
        _check_gradient(label, dtype, arguments[4], arguments[5])
    shape = check_extents(label, arguments[2], "shape")
    strides = check_extents(label, arguments[3], "stride")
    (offset,) = check_extents(label, arguments[1:2], "offset")
    available, rest = divmod(storage.nbytes, ITEM_SIZES[dtype])
    if rest:
        raise CheckpointError(f"{label}: {storage.nbytes} bytes are no whole number of {dtype}")
    check_view(label, shape, strides, offset, available)
    conjugate, negative = _bits(label, dtype, extra[0] if extra else None)
    entry = TensorEntry(dtype, shape, strides, storage.key, offset, conjugate, negative)
    return PickledTensor(entry, storage)


def _bits(label: str, dtype: str, metadata: object) -> tuple[bool, bool]:
    """Whether a tensor's metadata say that its values are conjugates, and that they are negatives.

    torch sets a bit for the key alone, whatever its value.
    """
    if metadata is None:
        return False, False
    if not isinstance(metadata, Mapping):
        raise CheckpointError(f"{label}: its metadata are {describe(metadata)}")
    found = set()
    for key, value in metadata.pairs:
        if (key != "conj" and key != "neg") or value is not True:
            raise CheckpointError(
                f"{label}: its metadata hold {quote(key) if type(key) is str else describe(key)}, "
                "which is not understood"
            )
        found.add(key)
    conjugate, negative = "conj" in found, "neg" in found
    if (conjugate and dtype not in _COMPLEX) or (
        negative and dtype not in _COMPLEX | _REAL | _SIGNED
    ):
        raise CheckpointError(f"{label}: its metadata do not fit {dtype}")
    return conjugate, negative


def _check_gradient(label: str, dtype: str, requires_grad: object, hooks: object) -> None:
    if type(requires_grad) is not bool:
        raise CheckpointError(f"{label}: whether it needs a gradient is {describe(requires_grad)}")
    if requires_grad and dtype not in _REAL | _COMPLEX | _FLOAT8:
        raise CheckpointError(f"{label}: {dtype} cannot have a gradient")
    if hooks is not None and not (isinstance(hooks, Mapping) and not hooks.pairs):
        raise UnsafeCheckpointError(f"{label}: has hooks, functions that run with it")


def _parameter(name: str, arguments: tuple[object, ...]) -> object:
    """``_rebuild_parameter…(data, requires_grad, hooks[, state])``."""
    if len(arguments) != _PARAMETERS[name]:
        raise CheckpointError("its pickle is damaged: a parameter with other arguments")
    data = arguments[0]
    dtype = data.entry.dtype if isinstance(data, PickledTensor) else "float32"
    _check_gradient("a parameter", dtype, arguments[1], arguments[2])
    if len(arguments) == 4:
        check_state(arguments[3], "a parameter")
    return data if isinstance(data, PickledTensor) else Opaque(name)


def _new_parameter(arguments: tuple[object, ...]) -> object:
    """``Parameter(data, requires_grad)``."""
    data = arguments[0] if arguments else None
    if isinstance(data, PickledTensor) and len(arguments) <= 2:
        _check_gradient("a parameter", data.entry.dtype, (*arguments, True)[1], None)
        return data
    return Opaque("torch.nn.parameter.Parameter")
