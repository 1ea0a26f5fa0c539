"""`pydetox compare`."""

from __future__ import annotations

from pathlib import Path

import click

from . import exit_codes, options


@click.command("compare")
@click.argument("before", type=options.FILE, metavar="RUN_A")
@click.argument("after", type=options.FILE, metavar="RUN_B")
@options.format_option
@click.option(
    "--output",
    type=options.FILE,
    metavar="FILE",
    help="Write the result to a file instead of stdout.",
)
def command(before: Path, after: Path, format_: str, output: Path | None) -> int:
    """Show the changes from one run to another: targets, contents, verdicts, numbers.

    Targets are matched by name. Exit code: 0 if nothing changed, 1 otherwise.
    """
    from ..reporting import to_json
    from ..reporting.values import clean_text
    from ..scanning.runs import compare_runs, load_run
    from .outputs import check_files, write_text

    check_files(output=output)
    first, second = load_run(before), load_run(after)
    changes = compare_runs(first, second)
    changed = [change for change in changes if change.kind != "same"]
    code = exit_codes.FOUND if changed else exit_codes.CLEAN
    if format_ == "json":
        document = {
            "schema": "pydetox.compare/1",
            "exit_code": code,
            "same": len(changes) - len(changed),
            "changes": [
                {
                    "name": change.name,
                    "kind": change.kind,
                    "before": None if change.before is None else change.before.content(),
                    "after": None if change.after is None else change.after.content(),
                }
                for change in changed
            ],
        }
        write_text(f"{to_json(document)}\n", output)
        return code
    lines = []
    for change in changed:
        verdicts = [
            "not there" if record is None else record.verdict
            for record in (change.before, change.after)
        ]
        lines.append(f"{change.kind}: {change.name}: {verdicts[0]} -> {verdicts[1]}")
    lines.append(f"{len(changed)} changed, {len(changes) - len(changed)} the same")
    write_text("".join(f"{clean_text(line)}\n" for line in lines), output)
    return code
