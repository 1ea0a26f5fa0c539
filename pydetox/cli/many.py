"""Commands over several checkpoints: which are meant, and what is written about them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.layout import is_training_state_name, is_weights_name
from ..errors import CheckpointError, UsageError, explain
from ..reporting import to_json
from ..reporting.values import clean_text
from ..scanning.targets import LIST_SUFFIX, NO_WEIGHTS, Target, find_targets
from . import exit_codes
from .group import print_error, print_warning
from .outputs import emit, table, write_text
from .wording import in_options

# As open_clip's training names what it saves after each epoch.
_EPOCH = re.compile(r"epoch_(\d+)\.pt")
_LATEST = "epoch_latest.pt"

# The number of lines about what is passed over; the others are counted.
_LISTED = 10


def expand(names: Sequence[str]) -> list[Target]:
    """Return the checkpoints that the names of targets mean, as in `scan`.

    A single name that is no folder of several is returned as it is. Raises UsageError without any.
    """
    if len(names) == 1 and _is_one(names[0]):
        return [Target(names[0], names[0])]
    found = find_targets(names)
    for line in passed_over(found.ignored):
        print_warning(line)
    if not found.targets:
        raise UsageError(f"{', '.join(names[:3])}: no checkpoint among them")
    return found.targets


def passed_over(ignored: Sequence[tuple[str, str]]) -> list[str]:
    """Return in a few lines what was no checkpoint: name and reason of each.

    Files that are no weights by their name are counted, and those beside weights are not mentioned:
    a checkpoint has a configuration, a tokenizer and a card.
    """
    others = [name for name, reason in ignored if reason == NO_WEIGHTS]
    lines = [f"{name}: {why}, and is passed over" for name, why in ignored if why != NO_WEIGHTS]
    if len(lines) > _LISTED:
        lines = [*lines[:_LISTED], f"{len(lines) - _LISTED} more are passed over"]
    beside = dict[Path, bool]()
    strange = []
    for name in others:
        folder = Path(name).parent
        if folder not in beside:
            beside[folder] = _holds_weights(folder)
        if not beside[folder]:
            strange.append(name)
    if strange:
        first = ", ".join(strange[:2]) + (", ..." if len(strange) > 2 else "")
        count = f"{len(strange)} files are" if len(strange) > 1 else "1 file is"
        lines.append(f"{count} no weights by name, and passed over ({first})")
    return lines


def _holds_weights(folder: Path) -> bool:
    try:
        return any(is_weights_name(entry.name) for entry in folder.iterdir())
    except OSError:
        return False


def one_checkpoint(name: str) -> str:
    """Return the checkpoint that a name means for a command that takes one.

    A folder of open_clip's training (`logs/`, `logs/NAME` or `checkpoints/`) means its last epoch,
    which is said on stderr. Raises UsageError for a folder that holds several others.
    """
    if _is_one(name) or not Path(name).is_dir():
        return name
    found = [target.reference for target in find_targets([name]).targets]
    if not found:
        return name  # reading it says why
    folders = {Path(one).parent for one in found}
    if len(folders) == 1:
        files = {Path(one).name: one for one in found}
        epochs = {int(m[1]): files[n] for n in files if (m := _EPOCH.fullmatch(n))}
        chosen = files.get(_LATEST) or (epochs[max(epochs)] if epochs else None)
        if len(found) == 1:
            chosen = found[0]
        if chosen is not None:
            print_warning(f"{name}: of {len(found)} checkpoints in it, {chosen} is taken")
            return chosen
    shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    raise UsageError(f"{name}: holds {len(found)} checkpoints ({shown}); name the one you mean")


def _may_be(name: str) -> bool:
    return is_weights_name(name) and not is_training_state_name(name)


def _is_one(name: str) -> bool:
    """Return whether a name is that of one checkpoint, as `load_checkpoint` takes it.

    A folder is many if its weights are those of a training's epochs, or lie in folders below it.
    """
    path = Path(name)
    if path.is_dir():
        try:
            inside = [entry.name for entry in path.iterdir() if _may_be(entry.name)]
        except OSError:
            return True  # reading it says why
        epochs = [one for one in inside if one == _LATEST or _EPOCH.fullmatch(one)]
        return bool(inside) and len(epochs) < len(inside)
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return False
    return path.exists() or re.search(r"[*?\[]", name) is None


def run_each(
    targets: Sequence[Target], work: Callable[[Target], dict[str, Any]], schema: str
) -> tuple[list[dict[str, Any]], int]:
    """Return one document per checkpoint, and the exit code.

    Of several checkpoints, one that cannot be read becomes a document with an `error`, and the
    others are worked on all the same. Of a single one, the error is raised.
    """
    documents: list[dict[str, Any]] = []
    for target in targets:
        if len(targets) == 1:
            documents.append(work(target))
            continue
        try:
            if target.problem is not None:
                raise CheckpointError(target.problem)
            documents.append({**work(target), "error": None})
        except CheckpointError as error:
            line = in_options(explain(error) or str(error))
            print_error(line)
            documents.append(
                {
                    "schema": schema,
                    "exit_code": exit_codes.ERROR,
                    "name": clean_text(target.name),
                    "error": line,
                }
            )
    return documents, exit_codes.combine([one["exit_code"] for one in documents])


def emit_all(
    documents: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    text: Mapping[str, Any],
    *,
    code: int,
    schema: str,
    format_: str,
    output: Path | None,
) -> None:
    """Write the results of several checkpoints, or of one, to stdout or to a file.

    documents: one per checkpoint. One alone is written as it is in JSON; several are an object with
    `checkpoints`, of the given schema. rows: the lines of a table in CSV, all with the same keys.
    text: for people.
    """
    if format_ == "text":
        emit({}, text, format_, output)
        return
    if format_ == "csv":
        content = table(rows)
    elif format_ == "jsonl":
        content = "".join(f"{to_json(one, indent=None)}\n" for one in documents)
    else:
        whole: Mapping[str, Any] = {
            "schema": schema,
            "exit_code": code,
            "checkpoints": list(documents),
        }
        content = f"{to_json(documents[0] if len(documents) == 1 else whole)}\n"
    write_text(content, output)
