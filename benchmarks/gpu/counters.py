"""ncu's counters as a small table: what every kernel took, and how busy it kept the GPU.

The kernels are those of `operators_once` in full size, which runs everything twice: the second
round counts. Under ncu a kernel runs alone, with cold caches: its time says more about the kernel
than about a search.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "compute_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
#: Into microseconds.
_UNITS = {"ns": 1e-3, "us": 1.0, "usecond": 1.0, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}


@dataclass(frozen=True)
class Counters:
    """What was counted of one kernel.

    Attributes:
        kernel: Its name with its template's arguments, without namespaces and parameters.
        blocks, threads: Of the grid, and of a block.
        microseconds: From its beginning to its end.
        memory_percent, compute_percent: Of the peak rate of device memory, and of the busiest pipe
            of the multiprocessors.
        warps_percent: The mean share of the warps that a multiprocessor can hold.
        registers: Of a thread.
    """

    kernel: str
    blocks: int
    threads: int
    microseconds: float
    memory_percent: float
    compute_percent: float
    warps_percent: float
    registers: int


def read_ncu(path: Path) -> list[Counters]:
    """Return the kernels of ncu's output (`--csv`) in their order, of two rounds the second.

    ValueError where there are none.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    calls: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[begin:]):
        call = calls.setdefault(row["ID"], {**row})
        call[row["Metric Name"]] = row["Metric Value"]
        if row["Metric Name"] == _METRICS["microseconds"]:
            call["unit"] = row["Metric Unit"]
    if not calls:
        raise ValueError(f"{path}: no kernel in it; expected the output of ncu --csv")
    found = [_counters(call) for call in calls.values()]
    half = len(found) // 2
    twice = [one.kernel for one in found[:half]] == [one.kernel for one in found[half:]]
    return found[half:] if twice else found


def _counters(call: dict[str, str]) -> Counters:
    values = {name: float(call[metric].replace(",", "")) for name, metric in _METRICS.items()}
    # Types of numbers are in brackets, too: "(int)4". The last bracket is that of the parameters.
    name = call["Kernel Name"].removeprefix("void ").rpartition("(")[0]
    return Counters(
        kernel=name,
        blocks=_volume(call["Grid Size"]),
        threads=_volume(call["Block Size"]),
        microseconds=round(values["microseconds"] * _UNITS[call["unit"]], 1),
        memory_percent=values["memory_percent"],
        compute_percent=values["compute_percent"],
        warps_percent=values["warps_percent"],
        registers=int(values["registers"]),
    )


def _volume(size: str) -> int:
    """Return the product of "(588, 1, 1)"."""
    product = 1
    for number in size.strip("()").split(","):
        product *= int(number)
    return product


def to_csv(counters: Sequence[Counters]) -> str:
    """Return them as comma-separated values with a head; `from_csv` reads them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Counters.__dataclass_fields__)
    for one in counters:
        writer.writerow(vars(one).values())
    return text.getvalue()


def from_csv(text: str) -> list[Counters]:
    """Return what `to_csv` wrote."""
    return [
        Counters(
            kernel=row["kernel"],
            blocks=int(row["blocks"]),
            threads=int(row["threads"]),
            microseconds=float(row["microseconds"]),
            memory_percent=float(row["memory_percent"]),
            compute_percent=float(row["compute_percent"]),
            warps_percent=float(row["warps_percent"]),
            registers=int(row["registers"]),
        )
        for row in csv.DictReader(io.StringIO(text))
    ]


def table(counters: Sequence[Counters]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| kernel | blocks × threads | µs | memory | compute | warps | registers |"
    yield "|---|---|---|---|---|---|---|"
    for one in counters:
        shares = (one.memory_percent, one.compute_percent, one.warps_percent)
        cells = [f"`{one.kernel}`", f"{one.blocks:,} × {one.threads}", f"{one.microseconds:.1f}"]
        cells += [*(f"{share:.0f}%" for share in shares), str(one.registers)]
        yield "| " + " | ".join(cells) + " |"
