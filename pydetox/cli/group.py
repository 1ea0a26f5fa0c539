"""The command group: finds the commands, turns every error into one line and an exit code."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any

import click

from ..errors import PydetoxWarning, UsageError, explain, one_line
from . import exit_codes
from .wording import in_options

# Name of a command and what its module is called; in the order in which --help shows them.
_COMMANDS = {
    "scan": "scan",
    "report": "report",
    "compare": "compare",
    "invert": "invert",
    "unlearn": "unlearn",
    "localize": "localize",
    "eval": "evaluate",
    "inspect": "inspection",
    "convert": "convert",
    "models": "models",
    "datasets": "datasets",
    "bench": "bench",
    "demo": "demo",
    "doctor": "doctor",
}


# In a line of its own, \b keeps click from filling the paragraph.
_HELP = """\
Find a backdoor in a CLIP checkpoint, subtract it from the weights, prove the repair.

\b
A checkpoint is one of
  model.safetensors, model.pt         a weights file
  folder, local-dir:folder            a folder with open_clip's files
  hf-hub:org/repo[@revision]          a repository of the Hugging Face hub
  ViT-B-32,laion2b_s34b_b79k          an architecture and a pretrained tag of open_clip

\b
Images are one of
  folder        one sub-folder per class (its name is the class name), or images alone
  file.npz      arrays `images` and, if known, `labels` and `class_names`
  file.csv      columns `filepath` and, if known, `label` (or `title`), as open_clip trains on
  file.tar, test/{0..3}.tar           WebDataset shards
  file.parquet  of Hugging Face's datasets, with pyarrow
  digits        the UCI digits that come with scikit-learn
  fashion-mnist, fashion-mnist-test   Debian's dataset-fashion-mnist; another place: =FOLDER
  cifar10=FOLDER, cifar10-test=FOLDER and others that torchvision has on the disk

\b
Exit codes
  0    clean, or the work is done
  1    a backdoor, or a suspicion of one
  2    an error, or no verdict (inconclusive); outranks 1
  3    nothing to scan
  4    wrong usage
  130  interrupted

Results go to stdout (with --format json: one JSON document and nothing else), progress and
errors to stderr.
"""


class Cli(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name, or None."""
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(f".{_COMMANDS[cmd_name]}", __package__).command
        assert isinstance(command, click.Command)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and leave with its exit code (or return it if not in standalone mode)."""
        # The library's warnings are said by the commands, in lines of their own.
        warnings.filterwarnings("ignore", category=PydetoxWarning)
        try:
            # click's own standalone mode would exit with 2 for a misspelt option.
            code = super().main(args, prog_name or "pydetox", complete_var, False, **extra) or 0
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - the last resort before a traceback
            code = _report(error)
        if standalone_mode:
            sys.exit(code)
        return code


def print_error(message: str) -> None:
    """Write an error line to stderr."""
    click.echo(f"error: {in_options(message)}", err=True)


def print_warning(message: str) -> None:
    """Write a warning line to stderr."""
    click.echo(f"warning: {in_options(one_line(message))}", err=True)


def _report(error: BaseException) -> int:
    """Say on stderr what ended the command; return the exit code."""
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        print_error("interrupted")
        return exit_codes.INTERRUPTED
    if isinstance(error, click.UsageError):
        command = "pydetox" if error.ctx is None else error.ctx.command_path
        message = one_line(error.format_message()).removesuffix(".")
        print_error(f"{message} (see: {command} --help)")
        return exit_codes.USAGE
    if isinstance(error, click.ClickException):
        print_error(one_line(error.format_message()))
        return exit_codes.ERROR
    line = explain(error)
    if line is not None:
        print_error(line)
        return exit_codes.USAGE if isinstance(error, UsageError) else exit_codes.ERROR
    for line in "".join(traceback.format_exception(error)).splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        click.echo(indent + one_line(line), err=True)
    print_error("this is a bug in pydetox; please report it with the output of `pydetox doctor`")
    return exit_codes.ERROR


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    try:
        version = metadata.version("pydetox")
    except metadata.PackageNotFoundError:
        version = "0+source"
    click.echo(f"pydetox {version}")
    ctx.exit()


@click.group(
    name="pydetox",
    cls=Cli,
    help=_HELP,
    no_args_is_help=False,
    context_settings={
        "show_default": True,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    show_default=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Find a backdoor in a CLIP checkpoint, subtract it, prove the repair."""


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end a scan.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # So that a temporary file is removed when a scheduler ends the process, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cli()
