"""Load the native libraries, once, when `pydetox.ops` is imported.

`_C` holds the operators' schemas and CPU kernels, `_C_cuda` the CUDA kernels; both register
themselves with torch when they are loaded. `_native` is an ordinary extension module beside them.
There is no fallback: without its native code pydetox does not run and raises
`NativeLibraryError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pydetox.errors import NativeLibraryError, UsageError

PACKAGE_DIR = Path(__file__).resolve().parent.parent

_REBUILD = "build it for this torch with: pip install --no-build-isolation -e . (or: pip install .)"


def load_operator_library(path: Path) -> None:
    """Load a library of operators.

    Raises:
        NativeLibraryError: the file is missing, or does not fit this torch.
    """
    if not path.is_file():
        raise NativeLibraryError(f"native library {path} is missing: {_REBUILD}")
    try:
        operators: Any = torch.ops  # its loader is not typed
        operators.load_library(path)
    except (OSError, RuntimeError) as error:
        raise NativeLibraryError(
            f"native library {path} does not fit torch {torch.__version__}: {error}: {_REBUILD}"
        ) from error


def load_native_module(name: str = "pydetox._native") -> ModuleType:
    """Import the extension module `name`.

    Raises:
        NativeLibraryError: the module is missing, or built for another Python.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NativeLibraryError(
            f"native module {name} cannot be imported: {error}: {_REBUILD}"
        ) from error


def call(operator: str, *arguments: Any) -> Any:
    """Call `torch.ops.pydetox.OPERATOR`. Python calls native operators only through this function.

    The native code checks the arguments (csrc/common/check.h), and this function raises its message
    as a `UsageError`. A graph of torch.compile runs without Python. There the error stays a
    ValueError, which `UsageError` is a subclass of.

    Raises:
        UsageError: The arguments do not fit together.
    """
    try:
        return getattr(torch.ops.pydetox, operator).default(*arguments)
    except ValueError as error:
        raise UsageError(str(error).partition("\n")[0]) from None
    except NotImplementedError:  # no kernel for where the tensors are: the native code is not asked
        devices = sorted({str(tensor.device) for tensor in _tensors(arguments)})
        if not devices:
            raise UsageError(f"{operator}: needs at least one tensor, found none") from None
        known = "the CPU and CUDA" if cuda_library_loaded() else "the CPU, built without CUDA"
        raise UsageError(
            f"{operator}: runs on {known}, found tensors on {', '.join(devices)}"
        ) from None


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from _tensors(argument)


def cuda_library_loaded() -> bool:
    """Whether the CUDA kernels are registered (a GPU need not be there)."""
    return _cuda_loaded


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: `scalar`, `avx2` or `avx512`.

    Raises:
        NativeLibraryError: `PYDETOX_CPU_CAPABILITY` names none, or one that this CPU cannot run.
    """
    try:
        return str(native.cpu_capability())
    except ValueError as error:
        raise NativeLibraryError(str(error)) from error


load_operator_library(PACKAGE_DIR / "_C.so")
native = load_native_module()
cpu_capability()  # a wrong PYDETOX_CPU_CAPABILITY shows now, not in the middle of a run

_cuda_path = PACKAGE_DIR / "_C_cuda.so"
# A torch without CUDA has no CUDA kernels to call, and could not open the library.
_cuda_loaded = torch.version.cuda is not None and bool(native.compile_info()["cuda"])
if _cuda_loaded:
    load_operator_library(_cuda_path)
