"""The options for what a command writes: formats, files and reports. `options` has them, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


def output_format_options(function: F) -> F:
    """Add --output-format and --lora-rank."""
    function = click.option(
        "--lora-rank",
        type=COUNT,
        metavar="N",
        help="With --output-format lora: the rank of the adapter; default: 32.",
    )(function)
    return click.option(
        "--output-format",
        type=click.Choice(["checkpoint", "lora"]),
        default="checkpoint",
        help="lora writes the change alone, as a LoRA adapter of peft for the model before it, "
        "which must be one of transformers. What the rank cuts off is said.",
    )(function)


def lora_rank_of(given: Mapping[str, Any]) -> int | None:
    """Return the rank of the adapter to write, or None for a checkpoint."""
    rank = given["lora_rank"]
    if given["output_format"] == "checkpoint":
        if rank is not None:
            raise click.UsageError("--lora-rank needs --output-format lora")
        return None
    return 32 if rank is None else int(rank)


format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json"]),
    default="text",
    help="The format of the result on stdout.",
)

table_format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "jsonl", "csv"]),
    default="text",
    help="The format of the result: text for people, one JSON document, one JSON line per "
    "checkpoint, or a table in CSV.",
)

run_format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "jsonl", "csv", "sarif", "html"]),
    default="text",
    help="The format of the result: text for people, one JSON document, one JSON line per "
    "checkpoint, a table in CSV, SARIF, or an HTML page.",
)

output_option = click.option(
    "--output",
    type=FILE,
    metavar="FILE",
    help="Write the result to a file instead of stdout.",
)

report_option = click.option(
    "--report", type=FILE, metavar="FILE", help="Also write a report as one HTML file."
)
