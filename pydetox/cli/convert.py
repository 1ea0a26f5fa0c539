"""`pydetox convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import one_line
from . import exit_codes, options
from .wording import in_options


@click.command("convert")
@click.argument("source", metavar="IN")
@click.argument("output", type=options.FILE, metavar="OUT")
@click.option("--overwrite", is_flag=True, show_default=False, help="Replace an existing file.")
@click.option(
    "--base",
    metavar="BASE",
    help="Of a LoRA adapter of peft: the file or folder of the model that it was trained for. The "
    "merged weights are written, under the names that the base has. With --output-format lora: the "
    "model that IN was made from.",
)
@options.output_format_options
@options.weights_key
def command(
    source: str,
    output: Path,
    overwrite: bool,
    base: str | None,
    weights_key: str | None,
    **given: Any,
) -> int:
    """Write the weights of an untrusted checkpoint as a .safetensors file.

    IN is a .pt file, or anything else on this machine that `inspect` takes. Nothing in it is
    unpickled. Names (without a wrapper's `module.`), dtypes, shapes and bytes of the tensors stay
    the same. Tensors that share weights get a copy each. Other content, such as the epoch and the
    optimizer, is left out. Findings about IN go to stderr and into the metadata of the result.

    OUT is the file. With --output-format lora it is a folder for an adapter, and --base names the
    model whose weights the adapter turns into those of IN.

    Exit code: 0 if OUT was written, 2 if IN is refused or damaged.
    """
    from ..checkpoints import convert_checkpoint
    from ..checkpoints.conversion import convert_to_adapter
    from ..errors import UsageError
    from ..reporting.values import percent
    from .outputs import check_replaced, to_stdout

    check_replaced(output, "OUT")
    rank = options.lora_rank_of(given)
    if rank is None:
        findings = convert_checkpoint(
            source, output, overwrite=overwrite, weights_key=weights_key, base=base
        )
    else:
        if base is None:
            raise UsageError("--output-format lora needs --base, the model that IN was made from")
        findings, made = convert_to_adapter(
            source, output, base=base, rank=rank, overwrite=overwrite, weights_key=weights_key
        )
        click.echo(
            f"rank {rank} leaves out {percent(made.error)} of the change (Frobenius norm)", err=True
        )
    for finding in findings:
        line = f"finding ({finding.rule}): {in_options(finding.message)}"
        click.echo(one_line(line), err=True)
    with to_stdout():
        click.echo(one_line(str(output)))
    return exit_codes.CLEAN
