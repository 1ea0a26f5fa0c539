"""The names that the pickle of a checkpoint may ask for, and what becomes of them.

Nothing is ever looked up by a name in a file. The lists only decide what is said about it:

- Names on the allow-list are known to be harmless whoever unpickles them.
- Other names of Python's own library, of torch, numpy and the tools around them are refused: what
  harmless checkpoints use of those is known, and the rest can run code under another loader.
- Names of other packages (a project's own options, say) become a finding: nobody knows what another
  loader would run.
"""

from __future__ import annotations

import sys
from typing import Final

from pydetox.checkpoints.index import ITEM_SIZES, Findings, quote
from pydetox.errors import UnsafeCheckpointError

MAX_NAME_BYTES = 256

STORAGES: Final = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
DTYPES: Final = {f"torch.{name}": name for name in ITEM_SIZES}

# Names that harmless checkpoints hold beside tensors (numpy scalars, option objects, sparse or
# quantised tensors). None of them can run a command whoever unpickles them; here they become an
# `Opaque` and are never looked up.
_INERT: Final = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.bool",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.dict",
        "builtins.float",
        "builtins.frozenset",
        "builtins.int",
        "builtins.list",
        "builtins.set",
        "builtins.slice",
        "builtins.str",
        "builtins.tuple",
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.deque",
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "torch.QInt32Storage",
        "torch.QInt8Storage",
        "torch.QUInt8Storage",
        "torch.Size",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.per_channel_affine",
        "torch.per_tensor_affine",
        "torch.serialization._get_layout",
    }
)


# Packages in which everything that harmless checkpoints use is on the list above; what else they
# have can run code.
_KNOWN_PACKAGES: Final = (
    sys.stdlib_module_names
    | {"__builtin__", "commands", "popen2", "exceptions", "copy_reg", "cPickle", "StringIO"}
    | {"asyncore", "cgi", "distutils", "imp", "lib2to3", "pipes", "telnetlib"}  # were in it once
    | {"torch", "torchvision", "torchaudio", "functorch", "numpy", "scipy", "pandas", "pydetox"}
    | {"pip", "setuptools", "pkg_resources", "wheel", "IPython", "ipykernel", "pytest", "_pytest"}
    | {"cloudpickle", "dill", "joblib", "jsonpickle", "torch_package", "numba", "cffi", "sh"}
)
# Anywhere in a path they lead out of a harmless package: `harmless.os.system`.
_DANGEROUS_PARTS: Final = frozenset(
    {
        "__builtin__",
        "builtins",
        "ctypes",
        "importlib",
        "nt",
        "os",
        "pickle",
        "posix",
        "pty",
        "runpy",
    }
    | {"shutil", "socket", "subprocess", "sys"}
    | {"Popen", "__import__", "compile", "eval", "exec", "execfile", "getattr", "import_module"}
    | {"popen", "setattr", "system"}
)


def check_global(module: str, name: str, findings: Findings) -> str:
    """Return the full name of a global.

    Raises:
        UnsafeCheckpointError: It could run code under another loader.
    """
    # Protocol 2 writes Python 2's name of this module.
    full = f"{'builtins' if module == '__builtin__' else module}.{name}"
    if full in _INERT or full in STORAGES or full in DTYPES:
        return full
    parts = full.split(".")
    if (
        len(full) > MAX_NAME_BYTES
        or not all(part.isidentifier() for part in parts)
        or parts[0] in _KNOWN_PACKAGES
        or any(part in _DANGEROUS_PARTS or part.startswith("__") for part in parts)
    ):
        raise UnsafeCheckpointError(
            f"its pickle asks for {quote(full)}, which is not on the list of harmless names: "
            "loading it elsewhere could run code"
        )
    findings.add(
        "unknown-global",
        f"its pickle asks for {quote(full)}: ignored here, another loader would import and call it",
    )
    return full
