"""`pydetox datasets`."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import click

from . import exit_codes, options


@click.command("datasets")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@options.table_format_option
@options.output_option
def command(patterns: tuple[str, ...], format_: str, output: Path | None) -> int:
    """List the data sets and the lists of class names that have a name.

    --images takes the data sets, and --class-names the lists. A pattern such as `cifar*` lists only
    what it matches. FOLDER is the folder in which a data set lies; nothing is downloaded. Folders
    of your own images need no name: see the images in `pydetox --help`.

    Exit code: 0.
    """
    from ..data.catalogue import listed_sets
    from ..errors import UsageError
    from ..reporting import to_json
    from .outputs import check_files, table, write_text

    check_files(output=output)
    found = [
        one
        for one in listed_sets()
        if not patterns or any(fnmatchcase(one.name, f"{p.lower()}*") for p in patterns)
    ]
    if not found:
        raise UsageError(f"no data set or list is called {' or '.join(patterns)}")
    rows = [asdict(one) for one in found]
    if format_ == "json":
        document = {"schema": "pydetox.datasets/1", "exit_code": exit_codes.CLEAN, "datasets": rows}
        content = f"{to_json(document)}\n"
    elif format_ == "jsonl":
        content = "".join(f"{to_json(row, indent=None)}\n" for row in rows)
    elif format_ == "csv":
        content = table(rows)
    else:
        width = max(len(one.name) for one in found)
        lines = [
            f"{one.name:<{width}}  {one.kind:<11}  "
            f"{'' if one.classes is None else f'{one.classes} classes':<12}  {one.source}"
            + (f" (not there: {one.obstacle})" if one.obstacle else "")
            for one in found
        ]
        content = "".join(f"{line}\n" for line in lines)
    write_text(content, output)
    return exit_codes.CLEAN
