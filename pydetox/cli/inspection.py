"""`pydetox inspect`: it must not import torch, so that it starts at once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import explain, one_line
from . import exit_codes, options
from .group import print_error
from .wording import in_options

if TYPE_CHECKING:
    from ..checkpoints import Finding, Inspection


@click.command("inspect")
@click.argument("checkpoints", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--hash",
    "hash_content",
    is_flag=True,
    show_default=False,
    help="Read the files once, for their SHA-256; checksums inside are checked, too.",
)
@click.option(
    "--summary", is_flag=True, show_default=False, help="Leave out the list of the tensors."
)
@options.weights_key
@options.table_format_option
@options.output_option
def command(
    checkpoints: tuple[str, ...],
    hash_content: bool,
    summary: bool,
    weights_key: str | None,
    format_: str,
    output: Path | None,
) -> int:
    """Tell what weights files hold, without unpickling them and without reading the weights.

    FILE is a .safetensors or .pt file, a .safetensors.index.json with its shards, or a folder. A
    finding is something odd that does not keep a file from being read, such as an unknown name in
    its pickle, two tensors of one name, or a name like a path.

    Exit code: 0 nothing odd, 1 a finding, 2 a file that is damaged or refused.
    """
    from ..checkpoints import inspect_checkpoint, parse_reference
    from ..errors import UnsafeCheckpointError, UsageError
    from .outputs import check_files, table, write_text

    check_files(output=output)
    for reference in checkpoints:
        parse_reference(reference)
    entries: list[dict[str, Any]] = []
    codes: list[int] = []
    told: list[str] = []
    for reference in checkpoints:
        try:
            found = inspect_checkpoint(
                reference, hash_content=hash_content, weights_key=weights_key
            )
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            print_error(line)
            unsafe = isinstance(error, UnsafeCheckpointError)
            entries.append({"name": reference, "error": in_options(line), "unsafe": unsafe})
            usage = isinstance(error, UsageError)
            codes.append(exit_codes.USAGE if usage else exit_codes.ERROR)
            continue
        found = replace(found, findings=tuple(map(_in_options, found.findings)))
        content = found.to_dict()
        if summary:
            del content["tensors"]
        entries.append({"name": reference, "error": None, **content})
        codes.append(exit_codes.FOUND if found.findings else exit_codes.CLEAN)
        if format_ == "text":
            lines = _lines(found, summary)
            if output is None:
                write_text("".join(f"{line}\n" for line in lines))
            else:
                told += lines
    code = exit_codes.combine(codes)
    # ASCII: lone surrogates can stand in a name, and have no UTF-8.
    if format_ == "json":
        document = {"schema": "pydetox.inspect/1", "exit_code": code, "files": entries}
        write_text(f"{json.dumps(document, indent=2)}\n", output)
    elif format_ == "jsonl":
        write_text("".join(f"{json.dumps(one)}\n" for one in entries), output)
    elif format_ == "csv":
        write_text(table([_row(one) for one in entries]), output)
    elif output is not None:
        write_text("".join(f"{line}\n" for line in told), output)
    return code


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a checkpoint in a table."""
    findings = entry.get("findings", ())
    return {
        **{key: entry.get(key) for key in ("name", "format", "sha256", "bytes", "parameters")},
        "findings": " ".join(one["rule"] for one in findings),
        "error": entry["error"],
    }


def _in_options(finding: Finding) -> Finding:
    return replace(finding, message=in_options(finding.message))


def _lines(found: Inspection, summary: bool) -> list[str]:
    from ..checkpoints.index import quote

    dtypes = Counter(entry.dtype for entry in found.tensors.values())
    rows = [
        ("format", found.format + (f", {len(found.files)} shards" if found.files else "")),
        ("bytes", f"{found.nbytes:,}"),
        ("sha256", found.sha256),
        ("tensors", f"{len(found.tensors):,}: " + ", ".join(f"{n} {d}" for d, n in dtypes.items())),
        ("weights under", quote(found.weights_key) if found.weights_key else None),
        ("parameters", f"{found.parameters:,}"),
        *(("metadata", f"{quote(k)}: {quote(v)}") for k, v in sorted(found.metadata.items())),
        *((f"finding ({f.rule})", f.message) for f in found.findings),
    ]
    lines = [one_line(str(found.path))]
    lines += [one_line(f"{label}: {value}") for label, value in rows if value is not None]
    if not summary:
        shown = {name: quote(name) for name in found.tensors}
        width = min(60, max(map(len, shown.values())))
        lines += [
            f"{shown[name]:{width}}  {entry.dtype}{list(entry.shape)}"
            for name, entry in found.tensors.items()
        ]
    return [lines[0], *(f"  {line}" for line in lines[1:])]
