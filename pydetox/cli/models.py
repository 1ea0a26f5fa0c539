"""`pydetox models`."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exit_codes, options

if TYPE_CHECKING:
    from ..models.catalogue import ListedModel


@click.command("models")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option(
    "--measure",
    is_flag=True,
    show_default=False,
    help="Build each architecture that pydetox reads, with random weights and cut to 2 layers, and "
    "compare it with open_clip; and each class of transformers, if that is installed. This takes "
    "an hour.",
)
@click.option(
    "--cache",
    type=options.FILE,
    metavar="FILE",
    help="A file of rows that were measured, which are shown. --measure adds each row when it is "
    "measured, and measures none again, so that an interrupted run goes on.",
)
@click.option(
    "--markdown",
    type=options.FILE,
    metavar="FILE",
    help="Write the table as a page like docs/models.md.",
)
@options.format_option
def command(
    patterns: tuple[str, ...],
    measure: bool,
    cache: Path | None,
    markdown: Path | None,
    format_: str,
) -> int:
    """List open_clip's architectures, which of them pydetox reads, and why it does not read others.

    Rows of transformers' classes follow where they were measured.

    A pattern such as `ViT-B-*` lists only the architectures that it matches. Each line shows the
    size of images, how they become square, the mean, the tokenizer, the number of pretrained tags,
    and whether pydetox reads the architecture. The tokenizer `clip` needs nothing else. A tokenizer
    of the hub needs transformers and its files.

    Exit code: 0; with --measure, 2 if an architecture does not equal open_clip's.
    """
    from ..atomic import write_file
    from ..errors import UsageError
    from ..models.catalogue import listed_models
    from ..progress import track
    from ..research import transformers_models
    from ..research.architectures import (
        Measured,
        in_own_process,
        measure_model,
        read_rows,
        write_row,
    )
    from ..research.models_page import markdown_page
    from .outputs import check_files, emit, to_stdout

    check_files(markdown=markdown)
    models = [one for one in listed_models() if _is_wanted(one.name, patterns)]
    others = [name for name in transformers_models.classes() if _is_wanted(name, patterns)]
    if not models and not others:
        raise UsageError(f"no architecture of open_clip is called {' or '.join(patterns)}")
    names = {one.name for one in models}
    known = {} if cache is None else read_rows(cache)
    measured: dict[str, Measured] = {k: v for k, v in known.items() if k in names or k in others}
    if measure:
        left = [one.name for one in models if one.obstacle is None and one.name not in measured]
        able = transformers_models.is_installed()
        first = [name for name in others if able and name not in measured]
        for name in track([*first, *left], "Measuring"):
            measure_one = transformers_models.measure_class if name in others else measure_model
            measured[name] = in_own_process(measure_one, name)
            if cache is not None:
                write_row(cache, name, measured[name])
    right = all(one.problem is None for one in measured.values())
    code = exit_codes.CLEAN if right else exit_codes.ERROR
    if markdown is not None:
        write_file(markdown, markdown_page(models, measured))
    if format_ == "json":
        rows = [
            asdict(one) | {"measured": asdict(measured[one.name]) if one.name in measured else None}
            for one in models
        ]
        theirs = [
            {"class": name, "measured": asdict(measured[name]) if name in measured else None}
            for name in others
        ]
        document = {"schema": "pydetox.models/1", "exit_code": code, "models": rows}
        emit({**document, "transformers": theirs}, {}, format_)
        return code
    with to_stdout():
        for line in _lines(models, measured):
            click.echo(line)
        for name in others:
            if name in measured:
                click.echo(f"transformers' {name}: {measured[name].in_words()}")
    return code


def _is_wanted(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a pattern matches a name, in any case; papers write `ViT-B/32`."""
    small = [pattern.lower().replace("/", "-") for pattern in patterns]
    return not patterns or any(fnmatchcase(name.lower(), pattern) for pattern in small)


def _lines(models: list[ListedModel], measured: dict[str, Any]) -> list[str]:
    width = max((len(one.name) for one in models), default=0)
    lines = []
    for one in models:
        prepared = one.preprocessing
        mean = ", ".join(f"{value:.3g}" for value in prepared["mean"])
        guess = f" (a guess: {', '.join(one.guessed)})" if one.guessed else ""
        state = "read" if one.obstacle is None else f"not read: {one.obstacle}"
        if one.name in measured:
            state += f", {measured[one.name].in_words()}"
        lines.append(
            f"{one.name:<{width}}  {one.image_size:>3} px  {prepared['resize_mode']:<8}  "
            f"mean {mean}{guess}  texts: {one.tokenizer or 'clip'}  {len(one.tags)} tags  {state}"
        )
    count = sum(one.obstacle is None for one in models)
    lines.append(f"{count} of {len(models)} are read")
    return lines
