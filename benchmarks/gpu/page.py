"""A summary as tables, and docs/gpu.md made of the summaries in docs/gpu.

python -m benchmarks.gpu.page            renew the tables of docs/gpu.md
python -m benchmarks.gpu.page --add runs/gpu/summary.json    take a result over, then renew;
                                                             counters, if ncu.csv lies beside it
python -m benchmarks.gpu.page --show runs/gpu/summary.json   print its tables

Only what was measured on a GPU, in full size, goes onto the page.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from . import counters, plan
from .summary import SummaryError, Value, figures, read_summary

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "gpu.md", ROOT / "docs" / "gpu"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
COUNTED = """The kernels in ncu, each alone and with cold caches. Memory and compute are shares of
the device's peak rates, warps of those that a multiprocessor can hold. The sizes are those of
`benchmarks/gpu/operators_once.py`.

"""
NOT_MEASURED = "Not measured yet: nobody has run `make check-gpu` on a GPU and sent the result."


def render(values: Mapping[str, Value]) -> str:
    """Return the tables of a summary: what it was run on, what was right, what was measured.

    Raises KeyError while the summary does not name its device yet.
    """
    device = str(values["device"])
    lines = [f"### {device}", ""]
    if values["device_type"] != "cuda":
        lines += ["Measured on a CPU: these figures say nothing about any GPU.", ""]
    if values["tiny"]:
        lines += ["Tiny sizes: the script was tried, nothing was measured.", ""]
    head = ("driver", "cuda", "nvcc", "torch", "cudnn", "python", "cpu", "cores", "commit", "date")
    lines += [", ".join(f"{name} {values[name]}" for name in head if name in values) + ".", ""]
    if values.get("complete") != "yes":
        lines += ["The run was cut off; what is missing was not reached.", ""]
    lines += ["| part | result | seconds |", "|---|---|---|"]
    for key, value in values.items():
        if re.fullmatch(r"(part|stage)\.[^.]+", key):
            name = key.partition(".")[2] + (" (stage)" if key.startswith("stage") else "")
            lines.append(f"| {name} | {_cell(value)} | {values.get(f'{key}.seconds', '')} |")
    measured = figures(values)
    # The bounds are about a GPU at work on full sizes.
    bounded = values["device_type"] == "cuda" and not values["tiny"]
    if measured:
        lines += ["", f"| figure on {_cell(device)} | measured | bound | |", "|---|---|---|---|"]
        lines += [_row(name, value, bounded) for name, value in measured.items()]
    missing = [name for name in plan.BOUNDS if name not in measured]
    if bounded and missing:
        lines += ["", f"With a bound, and not measured: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _row(name: str, value: Value, bounded: bool) -> str:
    if isinstance(value, str):
        return f"| {name} | {_cell(value)} | | |"
    kept = plan.holds(name, value) if bounded else None
    if kept is None:
        return f"| {name} | {value:.4g} | | |"
    bound = " ".join(map(str, plan.BOUNDS[name]))
    return f"| {name} | {value:.4g} | {bound} | {'holds' if kept else 'missed'} |"


def _cell(value: Value) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def check_publishable(path: Path, values: Mapping[str, Value]) -> None:
    """Raise SummaryError unless a summary is of a GPU, in full size."""
    if values.get("device_type") != "cuda" or str(values.get("device", "CPU")).startswith("CPU"):
        raise SummaryError(
            f"{path}: measured on {values.get('device')!r}; the page about GPUs takes none of a CPU"
        )
    if values.get("tiny") != 0:
        raise SummaryError(f"{path}: a run with TINY=1; expected one in full size")
    strange = [key for key in values if key.startswith("cpu.")]
    if strange:
        raise SummaryError(f"{path}: has figures of a CPU: {', '.join(strange[:3])}")


def section(folder: Path = RESULTS) -> str:
    """Return what stands between the marks of docs/gpu.md."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        values = read_summary(path)
        check_publishable(path, values)
        parts.append(render(values))
        counted = path.with_suffix(".csv")
        if counted.is_file():
            lines = counters.table(counters.from_csv(counted.read_text(encoding="utf-8")))
            parts.append(COUNTED + "\n".join(lines) + "\n")
    return "\n".join(parts) if parts else NOT_MEASURED + "\n"


def renewed(page: str, folder: Path = RESULTS) -> str:
    """Return the page with its tables made anew."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SummaryError(f"{PAGE}: no {BEGIN} ... {END} to put the tables between")
    return f"{head}{BEGIN}\n{section(folder)}{END}{tail}"


def file_name(values: Mapping[str, Value]) -> str:
    """Return what a result is called in docs/gpu: device and day."""
    device = re.sub(r"[^a-z0-9]+", "-", str(values["device"]).lower()).strip("-")
    return f"{device}-{str(values['date'])[:10]}.json"


def main() -> int:
    """Renew the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--add", type=Path, help="a summary.json to take over")
    parser.add_argument("--show", type=Path, help="a summary.json to print")
    options = parser.parse_args()
    try:
        if options.show:
            print(render(read_summary(options.show)), end="")
            return 0
        if options.add:
            values = read_summary(options.add)
            check_publishable(options.add, values)
            RESULTS.mkdir(exist_ok=True)
            shutil.copyfile(options.add, RESULTS / file_name(values))
            counted = options.add.with_name("ncu.csv")
            if counted.is_file():
                text = counters.to_csv(counters.read_ncu(counted))
                (RESULTS / file_name(values)).with_suffix(".csv").write_text(text)
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    except (ValueError, OSError, KeyError) as error:
        print(f"page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
