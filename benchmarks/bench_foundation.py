"""What repairs leave of a model's other tasks: `make bench-foundation`.

    python benchmarks/bench_foundation.py [--quick] [--device cuda] [--output runs/foundation]

Prints the table and writes summary.json, flat, and rows.json with everything that was measured.
The image sets have to be there: `make data`. Bases, victims and results are cached outside of the
repository, below $XDG_CACHE_HOME/pydetox; a second run computes what changed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pydetox.atomic import write_file
from pydetox.errors import PydetoxError
from pydetox.models.device import find_device
from pydetox.reporting import to_json
from pydetox.research.foundation.benchmark import FoundationPlan, quick_plan, run

_COLUMNS = (
    ("attacked_ca", "attacked CA"),
    ("other_ca_mean", "other CA"),
    ("other_ca_min", "least"),
    ("asr_mean", "ASR"),
    ("asr_max", "most"),
    ("asr_transfer_max", "elsewhere"),
    ("retrieval_kept", "R@1"),
)


def table(summary: dict[str, Any]) -> str:
    """Return the methods' figures as lines of text: shares kept, and ASR, in per cent."""
    lines = [f"{'method':26}{'models':>7}" + "".join(f"{title:>13}" for _, title in _COLUMNS)]
    for method, row in summary["methods"].items():
        cells = "".join(f"{row[key]:13.1%}" for key, _ in _COLUMNS)
        lines.append(f"{method:26}{row['models']:7}{cells}")
    for key, value in summary.items():
        if key != "methods":
            lines.append(f"{key:32}{value:10.4g}")
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="A run of minutes that shows that everything works.")
@click.option("--seeds", help="Other seeds, separated by commas.")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/foundation"))
def main(quick: bool, seeds: str | None, device: str, output: Path) -> None:
    """Run the benchmark."""
    plan = replace(quick_plan() if quick else FoundationPlan(), device=device)
    if seeds is not None:
        plan = replace(plan, seeds=tuple(int(one) for one in seeds.split(",")))
    try:
        find_device(device)
        document = run(plan, log=lambda text: click.echo(text, err=True))
    except PydetoxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    summary = document["summary"]
    flat = {key: value for key, value in summary.items() if key != "methods"}
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / "summary.json", to_json(flat) + "\n")
    write_file(output / "rows.json", to_json(document) + "\n")
    click.echo(table(summary))


if __name__ == "__main__":
    main()
