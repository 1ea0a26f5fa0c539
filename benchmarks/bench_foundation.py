"""What repairs leave of a model's other tasks, and how often defaults alone are wrong.

    python benchmarks/bench_foundation.py [--quick] [--part PART] [--device cuda]
        [--minutes 50] [--with EARLIER.json] [--output runs/foundation]

`make bench-foundation` runs it. Part `tasks` repairs models of several tasks. Part `verdicts` scans
clean and backdoored models with no option but a base and images (`default.fpr`, `default.tpr`).
Part `captions` poisons captions, finds the models without classes, and repairs them (`captions.*`).
Part `emoji40` repairs models of forty classes for a defender who knows ten of them. Part `imagenet`
repairs a tower with pretrained features and 1,000 classes (`imagenet.*`). Part `unlearn` times a
repair of the demo's models beside the earlier procedure (`unlearn.*`).
Prints the tables and writes summary.json, flat, and PART.json with everything that was measured. A
run of one part leaves the others' figures in summary.json as they are. `--minutes` ends the part
`verdicts` early; the same command then goes on where it was.
`--with` adds the models that
an earlier run of the part `tasks` wrote to its tasks.json to the table.
The image sets have to be there: `make data`. Bases, victims and results are cached outside of the
repository, below $XDG_CACHE_HOME/pydetox; a second run computes what changed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.earlier import earlier_option, read_earlier, with_earlier
from pydetox.atomic import write_file
from pydetox.detect.configuration import ScanConfig
from pydetox.errors import PydetoxError
from pydetox.models.device import find_device
from pydetox.reporting import to_json
from pydetox.research.foundation.benchmark import (
    ELSEWHERE,
    KNOWN,
    OWN,
    UNKNOWN,
    FoundationPlan,
    quick_plan,
    run,
    summarize,
)
from pydetox.research.foundation.captions_benchmark import (
    CaptionPlan,
    quick_caption_plan,
    run_captions,
)
from pydetox.research.foundation.imagenet import ImagenetPlan, quick_imagenet_plan
from pydetox.research.foundation.imagenet_benchmark import run_imagenet
from pydetox.research.foundation.repair_time import RepairTimePlan, run_repair_time
from pydetox.research.foundation.unnamed import UnnamedPlan, quick_unnamed_plan, run_unnamed
from pydetox.research.foundation.verdicts import (
    VerdictPlan,
    quick_verdict_plan,
    run_verdicts,
)
from pydetox.research.foundation.victims import ATTACKS

_COLUMNS = (
    ("attacked_ca", "attacked CA"),
    ("other_ca_mean", "other CA"),
    ("other_ca_min", "least"),
    ("asr_mean", "ASR"),
    ("asr_max", "most"),
    ("asr_transfer_max", "elsewhere"),
    ("retrieval_kept", "R@1"),
)


#: The lists that the part `tasks` writes, and what tells one of their rows from another.
_KEYS = {"victims": ("victim",), "rows": ("victim", "method"), "quarter": ("victim", "method")}

#: What the figures of each part begin with in summary.json.
_PREFIXES: dict[str, str | tuple[str, ...]] = {
    "verdicts": "default.",
    "captions": "captions.",
    "emoji40": "emoji40.",
    "imagenet": "imagenet.",
    "unlearn": "unlearn.",
    "tasks": ("tasks.", "quarter"),
}


def table(summary: dict[str, Any]) -> str:
    """Return the methods' figures as lines of text: shares kept, and ASR, in per cent."""
    lines = [f"{'method':26}{'models':>7}" + "".join(f"{title:>13}" for _, title in _COLUMNS)]
    for method, row in summary["methods"].items():
        cells = "".join(f"{row[key]:13.1%}" for key, _ in _COLUMNS)
        lines.append(f"{method:26}{row['models']:7}{cells}")
    lines.append(figures({k: v for k, v in summary.items() if k != "methods"}))
    return "\n".join(lines)


def verdict_tables(document: dict[str, Any]) -> str:
    """Return the models and the references of the part verdicts as lines of text."""
    lines = [
        f"{'model':32}{'rate':>9}{'distance':>10}{'ASR':>7}  {'verdict':14}{'p':>9}{'right':>7}"
    ]
    for row in sorted(document["rows"], key=lambda row: (row["attack"] or "", row["distance"])):
        asr = "" if row["asr"] is None else f"{row['asr']:.0%}"
        p = "" if row["p_value"] is None else f"{row['p_value']:.1e}"
        right = "" if row["attack"] is None else ("yes" if row["target_right"] else "no")
        lines.append(
            f"{row['name']:32}{row['rate']:9.1e}{row['distance']:10.4f}{asr:>7}  "
            f"{row['verdict']:14}{p:>9}{right:>7}"
        )
    lines += ["", f"{'references':32}{'distance':>10}{'deviation':>11}{'change':>9}{'largest':>9}"]
    for row in document["rungs"]:
        changes = [row["change"], row["largest_change"]]
        cells = "".join(f"{'' if c is None else f'{c:.3f}':>9}" for c in changes)
        name = f"{row['task']}-seed{row['seed']}, {row['family']}"
        lines.append(f"{name:32}{row['distance']:10.4f}{row['deviation']:11.3f}{cells}")
    return "\n".join(lines)


def figures(summary: dict[str, Any]) -> str:
    """Return flat figures as lines of text."""
    return "\n".join(f"{key:32}{value:10.4g}" for key, value in summary.items())


@click.command()
@click.option("--quick", is_flag=True, help="A run of minutes that shows that everything works.")
@click.option(
    "--part",
    type=click.Choice(["all", "tasks", "verdicts", "captions", "emoji40", "imagenet", "unlearn"]),
    default="all",
)
@click.option(
    "--seeds", help="Other seeds, separated by commas; `emoji40` and `imagenet` take the first."
)
@click.option(
    "--models",
    type=int,
    help="Clean models of a seed, instead of 40 (verdicts), 4 (captions) or 1 (imagenet).",
)
@click.option("--image-size", type=int, help="Part imagenet: instead of 224 pixels.")
@click.option("--head", type=int, help="Part imagenet: so many of the 1,000 classes.")
@click.option("--minutes", type=float, help="Part verdicts: begin no model after this time.")
@click.option("--repaired", type=int, help="Part captions: models to repair, of each seed.")
@click.option("--attacks", help="Part captions: such as badnets:0.03,sig:0.01; tasks: names alone.")
@click.option("--no-baselines", is_flag=True, help="Part tasks: pydetox alone.")
@click.option("--methods", help=f"Part tasks: of pydetox alone, some of {','.join(OWN)}.")
@earlier_option("Part tasks: the tasks.json")
@click.option("--search", type=click.Choice(["quick", "default", "thorough"]), default="default")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/foundation"))
def main(
    quick: bool,
    part: str,
    seeds: str | None,
    models: int | None,
    image_size: int | None,
    head: int | None,
    minutes: float | None,
    repaired: int | None,
    attacks: str | None,
    no_baselines: bool,
    methods: str | None,
    earlier: tuple[Path, ...],
    search: str,
    device: str,
    output: Path,
) -> None:
    """Run the benchmark. --search is of the part verdicts."""
    plan = replace(quick_plan() if quick else FoundationPlan(), device=device)
    verdicts = replace(quick_verdict_plan() if quick else VerdictPlan(), device=device)
    captions = replace(quick_caption_plan() if quick else CaptionPlan(), device=device)
    unnamed = replace(quick_unnamed_plan() if quick else UnnamedPlan(), device=device)
    imagenet = replace(quick_imagenet_plan() if quick else ImagenetPlan(), device=device)
    if image_size is not None:
        imagenet = replace(imagenet, image_size=image_size)
    if head is not None:
        imagenet = replace(imagenet, classes=head)
    repairs = RepairTimePlan(device=device)
    if quick:
        repairs = replace(repairs, seeds=repairs.seeds[-1:])
    if no_baselines:
        plan = replace(plan, methods=(UNKNOWN, KNOWN, ELSEWHERE))
    if methods is not None:
        unknown = [one for one in methods.split(",") if one not in OWN]
        if unknown:
            raise click.BadParameter(
                f"{', '.join(map(repr, unknown))}; expected some of {','.join(OWN)}",
                param_hint="--methods",
            )
        plan = replace(plan, methods=tuple(OWN[one] for one in methods.split(",")))
    if seeds is not None:
        numbers = tuple(int(one) for one in seeds.split(","))
        plan, verdicts = replace(plan, seeds=numbers), replace(verdicts, seeds=numbers)
        captions = replace(captions, seeds=numbers)
        unnamed = replace(unnamed, seed=numbers[0])
        imagenet = replace(imagenet, seed=numbers[0])
        repairs = replace(repairs, seeds=numbers)
    if models is not None:
        verdicts = replace(verdicts, clean=models, backdoored=max(1, models // 5))
        captions = replace(captions, clean=models)
        imagenet = replace(imagenet, clean=models)
    if repaired is not None:
        captions = replace(captions, repaired=repaired)
    if attacks is not None:
        pairs = [one.partition(":") for one in attacks.split(",")]
        unknown = [name for name, _, _ in pairs if name not in ATTACKS]
        if part == "tasks" and unknown:
            raise click.BadParameter(
                f"{', '.join(map(repr, unknown))}; expected some of {','.join(ATTACKS)}",
                param_hint="--attacks",
            )
        if part == "tasks":
            plan = replace(plan, attacks=tuple(name for name, _, _ in pairs))
        else:
            try:
                rates = tuple((name, float(rate)) for name, _, rate in pairs)
            except ValueError as error:
                raise click.BadParameter(
                    f"{attacks!r}; expected names and rates such as badnets:0.03",
                    param_hint="--attacks",
                ) from error
            captions = replace(captions, attacks=rates)
    if search != "default":
        scan = ScanConfig.quick() if search == "quick" else ScanConfig.thorough()
        verdicts = replace(verdicts, scan=scan)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "summary.json"

    def log(text: str) -> None:
        click.echo(text, err=True)

    def keep(name: str, document: dict[str, Any], flat: dict[str, Any]) -> None:
        known = json.loads(path.read_text()) if path.exists() else {}
        rest = {k: v for k, v in known.items() if not k.startswith(_PREFIXES[name])}
        write_file(output / f"{name}.json", to_json(document) + "\n")
        write_file(path, to_json({**rest, **flat}) + "\n")

    try:
        find_device(device)
        before = read_earlier(earlier)
        for kind, keys in _KEYS.items():
            with_earlier([], before, kind, keys)  # a file of something else is refused at once
        if part in ("all", "verdicts"):
            document = run_verdicts(verdicts, log, minutes=minutes or math.inf)
            keep("verdicts", document, document["summary"])
            click.echo(f"{verdict_tables(document)}\n\n{figures(document['summary'])}")
        others: dict[str, Callable[[], dict[str, Any]]] = {
            "captions": lambda: run_captions(captions, log),
            "emoji40": lambda: run_unnamed(unnamed, log),
            "imagenet": lambda: run_imagenet(imagenet, log),
            "unlearn": lambda: run_repair_time(repairs, log),
        }
        for name, go in others.items():
            if part in ("all", name):
                document = go()
                keep(name, document, document["summary"])
                click.echo(figures(document["summary"]))
        if part in ("all", "tasks"):
            document = run(plan, log)
            for kind, keys in _KEYS.items():
                document[kind] = with_earlier(document[kind], before, kind, keys)
            summary = document["summary"] = summarize(document["rows"], document["quarter"])
            keep("tasks", document, {k: v for k, v in summary.items() if k != "methods"})
            click.echo(table(summary))
    except PydetoxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
