"""`pydetox convert`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import one_line
from . import exit_codes, options
from .wording import in_options


@click.command("convert")
@click.argument("source", metavar="IN")
@click.argument("output", type=options.FILE, metavar="OUT.safetensors")
@click.option("--overwrite", is_flag=True, show_default=False, help="Replace an existing file.")
@click.option(
    "--base",
    metavar="BASE",
    help="Of a LoRA adapter of peft: the file or folder of the model that it was trained for. The "
    "merged weights are written, under the names that the base has.",
)
@options.weights_key
def command(
    source: str, output: Path, overwrite: bool, base: str | None, weights_key: str | None
) -> int:
    """Write the weights of an untrusted checkpoint as a .safetensors file.

    IN is a .pt file, or anything else on this machine that `inspect` takes. Nothing in it is
    unpickled. Names (without a wrapper's `module.`), dtypes, shapes and bytes of the tensors stay
    the same. Tensors that share weights get a copy each. Other content, such as the epoch and the
    optimizer, is left out. Findings about IN go to stderr and into the metadata of the result.

    Exit code: 0 if the file was written, 2 if IN is refused or damaged.
    """
    from ..checkpoints import convert_checkpoint
    from .outputs import to_stdout

    findings = convert_checkpoint(
        source, output, overwrite=overwrite, weights_key=weights_key, base=base
    )
    for finding in findings:
        line = f"finding ({finding.rule}): {in_options(finding.message)}"
        click.echo(one_line(line), err=True)
    with to_stdout():
        click.echo(one_line(str(output)))
    return exit_codes.CLEAN
