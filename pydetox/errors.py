"""Every error pydetox raises on purpose.

A message is one line that names the thing, what was found and what was expected. The command line
prints it without a traceback; a traceback therefore always means a bug.
"""

from __future__ import annotations


class PydetoxError(Exception):
    """Base class of all errors that pydetox raises on purpose."""


class PydetoxWarning(UserWarning):
    """Something was guessed or left out that a result depends on; the command line shows it too."""


class UsageError(PydetoxError, ValueError):
    """An argument or option has a value that makes no sense (exit code 4 on the command line)."""


class CheckpointError(PydetoxError):
    """A checkpoint cannot be found, read or written."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint does something that no harmless one needs, such as run code when loaded."""


class ArchitectureError(CheckpointError):
    """The weights do not fit the architecture (missing, extra, misshapen) or hold NaN."""


class DataError(PydetoxError):
    """Images, labels or class names cannot be read, are empty, or do not fit the model."""


class OutputError(PydetoxError):
    """A result cannot be written: no permission, no space, or it would overwrite something."""


class NativeLibraryError(PydetoxError):
    """The native library is missing, was built for another torch, or lacks a function."""


class EngineError(PydetoxError):
    """The workers of a scan cannot be started or reached."""


class DeviceMemoryError(PydetoxError):
    """A device has too little free memory even for the smallest piece of the work."""


def explain(error: BaseException) -> str | None:
    """Return one line that says what went wrong, or None if the error is a bug of pydetox."""
    if isinstance(error, PydetoxError):
        return one_line(str(error))
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return one_line(f"{where}{error.strerror or error}")
    if is_out_of_memory(error):
        return one_line(f"out of memory: {error}" if str(error) else "out of memory")
    return None


# What torch says where memory is short and the error has no type of its own: the host's allocator
# on two systems, a kernel launch, and the libraries of matrix products.
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the host or a GPU has no memory left."""
    # torch's errors by what they say: this module does not import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(say in str(error) for say in _OUT_OF_MEMORY)


def one_line(message: str) -> str:
    """Return a message as one line without control characters, which names in files may have."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
