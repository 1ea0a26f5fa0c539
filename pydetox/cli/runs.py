"""Runs over many checkpoints: from records to documents, exit codes and output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_file
from ..reporting import print_text, render_text, to_json
from ..reporting.run import run_document, run_text
from ..reporting.run_html import run_page
from ..reporting.sarif import to_sarif
from ..reporting.values import duration
from ..scanning.store import read_artifacts
from . import exit_codes
from .outputs import table, to_stdout, write_text
from .wording import in_options

# Those of a table; docs/scanning.md explains them.
_COLUMNS = (
    "name",
    "sha256",
    "verdict",
    "target",
    "p_value",
    "p_l1",
    "family",
    "objective",
    "reason",
    "seconds",
    "error",
)

if TYPE_CHECKING:
    from ..scanning import ScanRecord, Targets
    from ..scanning.estimate import Estimate


def exit_code(records: Iterable[ScanRecord], fail_on: str, *, complete: bool = True) -> int:
    """Return the exit code of a run.

    fail_on: the weakest verdict that counts as found. complete: whether all targets were reached.
    """
    records = list(records)
    if records and complete and all(record.error_kind == "usage" for record in records):
        return exit_codes.USAGE  # not one checkpoint: the options
    codes = [_code(record, fail_on) for record in records]
    if not complete:
        codes.append(exit_codes.ERROR)
    return exit_codes.combine(codes) if codes else exit_codes.NOTHING


def _code(record: ScanRecord, fail_on: str) -> int:
    if record.verdict == "suspicious" and fail_on == "backdoored":
        return exit_codes.CLEAN
    return exit_codes.of_verdict(record.verdict)


def emit_run(
    records: Sequence[ScanRecord],
    *,
    code: int,
    seed: int,
    images: str,
    texts: str | None = None,
    calibration: Mapping[str, Any] | None,
    ignored: Iterable[Sequence[str]],
    run: Path | None,
    format_: str,
    output: Path | None,
    report: Path | None,
    not_reached: Sequence[str] = (),
) -> None:
    """Write the results of a run to stdout or a file, and an HTML report if one is wanted."""
    document = run_document(
        [_in_options(record.to_dict()) for record in records],
        exit_code=code,
        seed=seed,
        images=images,
        texts=texts,
        calibration=calibration,
        ignored=ignored,
        not_reached=not_reached,
    )
    kept = {record.key: record.artifacts for record in records if record.artifacts}

    def pictures(result: Mapping[str, Any]) -> Mapping[str, bytes]:
        key = result["key"]
        if key in kept or run is None or key is None:
            return kept.get(key, {})
        return read_artifacts(run, key)

    if report is not None:
        write_file(report, run_page(document, pictures))
    if format_ == "text":
        text = run_text(document)
        if output is not None:
            write_file(output, render_text(text))
        else:
            with to_stdout():
                print_text(text)
        return
    if format_ == "json":
        content = f"{to_json(document)}\n"
    elif format_ == "jsonl":
        lines = [to_json(one, indent=None) for one in document["results"]]
        content = "".join(f"{line}\n" for line in lines)
    elif format_ == "csv":
        content = table([_row(one) for one in document["results"]])
    elif format_ == "sarif":
        content = f"{to_json(to_sarif(document, version=_version()))}\n"
    else:
        content = run_page(document, pictures)
    write_text(content, output)


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a checkpoint in a table."""
    seconds = (result.get("seconds") or {}).get("total")
    return {key: result.get(key) for key in _COLUMNS} | {"seconds": seconds}


def _in_options(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result whose messages name options instead of the library's arguments."""
    error = result["error"]
    translated: dict[str, Any] = {
        "reason": in_options(result["reason"]),
        "error": error and in_options(error),
        "findings": [{**f, "message": in_options(f["message"])} for f in result["findings"]],
    }
    if "warnings" in result:
        translated["warnings"] = list(map(in_options, result["warnings"]))
    return {**result, **translated}


def emit_dry_run(
    targets: Targets, estimated: Estimate | None, format_: str, output: Path | None
) -> None:
    """Write what would be scanned, what would be passed over, and what it should take."""
    if format_ == "json":
        document = {
            "schema": "pydetox.targets/1",
            "targets": [
                {"name": target.name, "path": target.path, "problem": target.problem}
                for target in targets.targets
            ],
            "ignored": [{"name": name, "reason": reason} for name, reason in targets.ignored],
            "other_shards": targets.other_shards,
            "estimate": None if estimated is None else asdict(estimated),
        }
        write_text(f"{to_json(document)}\n", output)
        return
    if format_ in ("jsonl", "csv"):
        rows = [{"name": t.name, "path": t.path, "problem": t.problem} for t in targets.targets]
        listed = "".join(f"{to_json(row, indent=None)}\n" for row in rows)
        write_text(listed if format_ == "jsonl" else table(rows), output)
        return
    lines = [
        f"{target.name}" + (f" ({in_options(target.problem)})" if target.problem else "")
        for target in targets.targets
    ]
    lines += [f"passed over: {name}: {reason}" for name, reason in targets.ignored]
    lines.append(f"{len(targets.targets)} to scan, {len(targets.ignored)} passed over")
    if targets.other_shards:
        lines[-1] += f", {targets.other_shards} in other shards"
    if estimated is not None:
        lines.append(
            f"at most about {duration(estimated.seconds)} and {estimated.memory / 2**30:.1f} GiB a "
            f"worker, with {estimated.workers} of {estimated.threads} threads; timed on "
            f"{estimated.timed_on}, without the clean references"
        )
    elif targets.targets:
        lines.append("how long it takes is not known: no checkpoint on the disk can be read")
    from ..errors import one_line

    write_text("".join(f"{one_line(line)}\n" for line in lines), output)


def _version() -> str:
    try:
        return metadata.version("pydetox")
    except metadata.PackageNotFoundError:
        return "0+source"
