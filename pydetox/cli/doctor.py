"""`pydetox doctor`."""

from __future__ import annotations

from typing import Any

import click

from . import exit_codes, options

# What the names of build_info() mean to people.
_LABELS = {
    "pydetox": "pydetox",
    "python": "Python",
    "torch": "torch",
    "platform": "platform",
    "native_library": "native library",
    "compiler": "compiler",
    "built_with_torch": "built with torch",
    "cpu_capability": "CPU capability in use",
    "cpu_capabilities": "CPU capabilities here",
    "cpu_capability_forced": "PYDETOX_CPU_CAPABILITY",
    "threads": "CPU threads",
    "parallel_backend": "parallel backend",
    "cuda_built": "CUDA kernels built",
    "cuda_architectures": "CUDA architectures",
    "cuda_toolkit": "CUDA toolkit",
    "cuda_loaded": "CUDA kernels loaded",
    "fast_towers": "fast image towers",
    "torch_cuda": "CUDA of torch",
    "gpus": "GPUs seen",
}


@click.command("doctor")
@options.format_option
def command(format_: str) -> int:
    """Show versions, what was built and what is in use: the text to paste into a bug report.

    Exit code: 0 if the native library works, 2 if it does not.
    """
    from .. import build_info
    from .group import one_line
    from .outputs import emit, to_stdout

    info = build_info()
    works = info["cpu_capability"] is not None
    code = exit_codes.CLEAN if works else exit_codes.ERROR
    if format_ == "json":
        emit({"schema": "pydetox.doctor/1", "exit_code": code, **info}, {}, format_)
        return code
    width = max(map(len, _LABELS.values()))
    with to_stdout():
        for key, value in info.items():
            click.echo(f"{_LABELS.get(key, key):<{width}}  {one_line(_in_words(value))}")
    return code


def _in_words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
