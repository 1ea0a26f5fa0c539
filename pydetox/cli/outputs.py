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


def check_files(**paths: Path | None) -> None:
    """Rehearse writing each file. paths: by the name of the option.

    Raises OutputError for one that cannot be written, UsageError when two are the same.
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        name = option.replace("_", "-")
        if path.resolve() in seen:
            raise UsageError(f"--{seen[path.resolve()]} and --{name} are the same file: {path}")
        seen[path.resolve()] = name
        rehearse_file(path)


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
