"""The command line; `pydetox --help` lists the commands.

One file per command, and beside them what they share: `group` (errors and exit codes), `options`,
`inputs`, `outputs`, `runs`, `summaries`. Results go to stdout, progress and errors to stderr.
torch is imported by a command when it runs, so that `--help` is quick.
"""

from __future__ import annotations

from .group import cli, main

__all__ = ["cli", "main"]
