"""Where results go: checked before the work, written after it."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..atomic import rehearse_file, write_file
from ..errors import OutputError, UsageError
from .earlier import is_earlier, kind_of_result

#: The parameters of commands that name what is read. A test holds them beside all commands.
READ = (
    "checkpoints",
    "checkpoint",
    "source",
    "run",
    "before",
    "after",
    "images",
    "texts",
    "data",
    "class_names",
    "templates",
    "model",
    "base",
    "base_model",
    "reference_models",
    "calibration_file",
    "known_vectors",
    "trigger",
    "cache",
)
#: Where the context of a command keeps its --config, which is no parameter.
CONFIG_KEY = "pydetox.config"


def check_files(**paths: Path | None) -> None:
    """Rehearse writing each file. paths: by the name of the option.

    Raises OutputError for one that cannot be written or that is there and is no earlier result, and
    UsageError when two are the same, or one is what the command reads.
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        name = f"--{option.replace('_', '-')}"
        if path.resolve() in seen:
            raise UsageError(f"{seen[path.resolve()]} and {name} are the same file: {path}")
        seen[path.resolve()] = name
        for given, read in _inputs():
            if path.resolve() == read:
                raise UsageError(
                    f"{name} and {given} are the same file: {path}; name another one for the result"
                )
        _refuse_another_file(path, kind_of_result(option))
    for path in paths.values():
        if path is not None:
            rehearse_file(path)


def check_replaced(folder: Path, name: str = "--output") -> None:
    """Raise UsageError if a folder that the command replaces has in it what the command reads.

    name: How the folder was given.
    """
    for given, read in _inputs():
        if folder.resolve() in (read, *read.parents):
            raise UsageError(
                f"{name} {folder} would replace {given}, which the command reads; name another one "
                "for the result"
            )


def _inputs() -> Iterator[tuple[str, Path]]:
    """Yield how each file or folder was given that the command reads, and its real path."""
    ctx = click.get_current_context(silent=True)
    if ctx is None:
        return
    given = [(p, ctx.params.get(str(p.name))) for p in ctx.command.params if p.name in READ]
    named = [
        (p.opts[0] if isinstance(p, click.Option) else (p.metavar or str(p.name).upper()), value)
        for p, value in given
    ]
    for name, value in [*named, ("--config", ctx.meta.get(CONFIG_KEY))]:
        for one in value if isinstance(value, list | tuple) else [value]:
            # As in cifar10=FOLDER and local-dir:FOLDER.
            text = "" if one is None else os.fspath(one)
            for path in {text, text.partition("=")[2], text.removeprefix("local-dir:")} - {""}:
                if os.path.lexists(path):
                    yield name.rstrip("."), Path(path).resolve()


def _refuse_another_file(path: Path, kind: str) -> None:
    """Raise OutputError for a file that is there and is no earlier result of that kind."""
    try:
        earlier = not path.is_file() or is_earlier(path, kind)
    except OSError as error:
        raise OutputError(
            f"{path}: is there and cannot be read ({error.strerror or error}), so it is not "
            "replaced"
        ) from error
    if not earlier:
        raise OutputError(
            f"{path}: is there and is not {kind} of pydetox, so it is not replaced; name another "
            "file, or remove this one"
        )


@contextlib.contextmanager
def to_stdout() -> Iterator[None]:
    """Guard a block that writes results to stdout; OutputError when they do not arrive.

    A reader that has seen enough and closes the pipe, such as `head`, is no error.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered would fail again, with a traceback, when Python flushes at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return
        raise OutputError(f"stdout: cannot be written: {error.strerror or error}") from error


def emit(
    document: Mapping[str, Any],
    text: Mapping[str, Any],
    format_: str,
    path: Path | None = None,
) -> None:
    """Write the result to stdout or, given a path, to that file.

    document: for JSON. text: for people, as `pydetox.reporting.render_text` takes it.
    """
    from ..reporting import print_text, render_text, to_json

    if path is not None:
        content = f"{to_json(document)}\n" if format_ == "json" else render_text(text)
        write_file(path, content)
        return
    with to_stdout():
        if format_ == "json":
            # Bytes: JSON is UTF-8 whatever the terminal is.
            click.echo(f"{to_json(document)}\n".encode(), nl=False)
        else:
            print_text(text)


def write_text(content: str, output: Path | None = None) -> None:
    """Write text to a file or, without one, to stdout, as UTF-8 whatever the terminal is."""
    data = content.encode("utf-8", "backslashreplace")
    if output is not None:
        write_file(output, data)
        return
    with to_stdout():
        click.echo(data, nl=False)
        sys.stdout.flush()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV, with a line of the keys first.

    Text that a spreadsheet would take for a formula is quoted.
    """
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return file.getvalue()


def _cell(value: Any) -> Any:
    # As in JSON, a number that is infinite or none at all is left out.
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t"):
        return f"'{value}"
    return "" if value is None else value
