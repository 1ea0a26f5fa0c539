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
@click.option(
    "--selftest",
    is_flag=True,
    show_default=False,
    help="Run every operator on every device of this machine, and compare the results with "
    "float64.",
)
@options.format_option
def command(selftest: bool, format_: str) -> int:
    """Show versions, build and devices, for a bug report.

    Exit code: 0 if the native library works (and, with --selftest, every operator is right), 2 if
    not.
    """
    from .. import build_info
    from ..errors import one_line
    from .outputs import emit, to_stdout

    info = build_info()
    works = info["cpu_capability"] is not None
    rows = _selftest() if selftest and works else None
    right = works and all(row["passed"] for row in rows or [])
    code = exit_codes.CLEAN if right else exit_codes.ERROR
    if format_ == "json":
        extra = {} if rows is None else {"selftest": rows}
        emit({"schema": "pydetox.doctor/1", "exit_code": code, **info, **extra}, {}, format_)
        return code
    width = max(map(len, _LABELS.values()))
    with to_stdout():
        for key, value in info.items():
            click.echo(f"{_LABELS.get(key, key):<{width}}  {one_line(_in_words(value))}")
        if rows is not None:
            click.echo()
            for line in _table(rows):
                click.echo(line)
    return code


def _selftest() -> list[dict[str, Any]]:
    from ..selftest import selftest

    return [outcome.to_dict() for outcome in selftest()]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ("operator", "sizes", "dtype", "device", "error", "bound", "bytes", "GB/s", "")
    cells = [
        (
            row["operator"],
            row["what"],
            row["dtype"],
            row["device"],
            f"{row['error']:.1e}",
            f"{row['bound']:.1e}",
            f"{row['bytes']:,}",
            f"{row['gigabytes_per_second']:.2f}",
            " ".join(filter(None, ("ok" if row["passed"] else "WRONG", row["note"]))),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *cells)
    ]
    wrong = sum(not row["passed"] for row in rows)
    devices = len({row["device"] for row in rows})
    return [
        *lines,
        f"{len(rows)} cases on {devices} device{'s' if devices != 1 else ''}, {wrong} wrong",
    ]


def _in_words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
