"""Many classes: what screening costs and decides, beside the search of every class.

    python benchmarks/bench_classes.py [--quick] [--seeds 20,21] [--device cuda]
        [--output runs/foundation]

Prints one line per suspect and the figures, and writes classes.json with everything that was
measured. The figures are added to summary.json, which `benchmarks/bench_foundation.py` writes, too.
The image sets have to be there: `make data`. Models and results are cached outside of the
repository, below $XDG_CACHE_HOME/pydetox; a second run computes what changed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import click

from pydetox.atomic import write_file
from pydetox.errors import PydetoxError
from pydetox.models.device import find_device
from pydetox.reporting import to_json
from pydetox.research.foundation.classes import ClassesPlan, quick_classes_plan
from pydetox.research.foundation.classes_benchmark import run_classes


@click.command()
@click.option("--quick", is_flag=True, help="A run of under a minute that shows that it works.")
@click.option("--seeds", help="Other seeds for every number of classes, separated by commas.")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/foundation"))
def main(quick: bool, seeds: str | None, device: str, output: Path) -> None:
    """Run the benchmark."""
    plan = replace(quick_classes_plan() if quick else ClassesPlan(), device=device)
    if seeds is not None:
        chosen = tuple(int(one) for one in seeds.split(","))
        plan = replace(plan, seeds=(chosen,) * len(plan.classes))
    try:
        find_device(device)
        document = run_classes(plan, log=lambda text: click.echo(text, err=True))
    except PydetoxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    output.mkdir(parents=True, exist_ok=True)
    summary = output / "summary.json"
    figures = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    figures |= document["summary"]
    write_file(summary, to_json(figures) + "\n")
    write_file(output / "classes.json", to_json(document) + "\n")
    for key, value in document["summary"].items():
        click.echo(f"{key:32}{value:10.4g}")


if __name__ == "__main__":
    main()
