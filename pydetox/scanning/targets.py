"""Finding the checkpoints that targets such as folders, globs and lists name.

Nothing is left out silently. Everything else in a folder or a list is kept in `Targets.ignored`,
with the reason.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints import CheckpointIdentity, identify_checkpoint, parse_reference
from ..checkpoints.layout import (
    WEIGHT_NAMES,
    find_weights,
    index_of_shard,
    is_shard_index_name,
    is_training_state_name,
    is_weights_name,
)
from ..data.lines import lines_of
from ..errors import CheckpointError, UsageError
from .store import is_run

LIST_SUFFIX = ".txt"

#: The reason why a file is passed over whose name is not that of weights.
NO_WEIGHTS = "is no weights file by its name"
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Target:
    """One checkpoint to scan.

    Attributes:
        name: The name in reports; no two targets have the same name.
        reference: The name that `load_checkpoint` takes.
        path: The weights file or the index of shards; None if it is not on the disk yet.
        problem: The reason why it cannot be scanned, if it is known without reading the file.
    """

    name: str
    reference: str
    path: str | None = None
    problem: str | None = None

    def identity(self) -> CheckpointIdentity | None:
        """Return its files; None if it is not on the disk or cannot be resolved.

        The attempt to read it then raises the error.
        """
        if self.path is None:
            return None
        with contextlib.suppress(CheckpointError, UsageError):
            return identify_checkpoint(self.reference)
        return None

    def signature(self) -> tuple[int, ...] | None:
        """Return the signature of all its files; None if it has no identity."""
        identity = self.identity()
        return None if identity is None else identity.signature()

    def size(self, identity: CheckpointIdentity | None = None) -> int | None:
        """Return the size of its weights in bytes, all shards together; None if it is not known.

        identity: The target's identity, if it is already known.
        """
        identity = identity or self.identity()
        if identity is None:
            return None
        with contextlib.suppress(CheckpointError):
            return identity.nbytes
        return None


@dataclass
class Targets:
    """The checkpoints in order, and everything that was passed over as (name, reason)."""

    targets: list[Target] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    other_shards: int = 0


def find_targets(
    specs: Iterable[str | os.PathLike[str]], *, shard: tuple[int, int] | None = None
) -> Targets:
    """Expand the names of targets to checkpoints. A name that occurs twice counts once.

    Args:
        specs: Weights files; folders, which are searched at any depth; globs, in which `**` matches
            any number of folders; lists (`models.txt`: one target per line, relative to the list,
            `#` begins a comment); `local-dir:folder`; `hf-hub:org/repo[@revision]`; `MODEL,TAG` of
            open_clip.
        shard: (i, n) to keep the targets whose name hashes to i - 1 modulo n. n machines with the
            same list then share the work, and a target stays in its shard when the list grows.

    Raises:
        UsageError: A name has no meaning, or a list cannot be read.
    """
    found = Targets()
    seen: dict[str, None] = {}
    for target in _expand(specs, found, Path(), ()):
        if target.name not in seen:
            seen[target.name] = None
            found.targets.append(target)
    if shard is not None:
        index, count = shard
        kept = [t for t in found.targets if _bucket(t.name, count) == index - 1]
        found.other_shards = len(found.targets) - len(kept)
        found.targets = kept
    return found


def _expand(
    specs: Iterable[str | os.PathLike[str]], found: Targets, root: Path, lists: tuple[Path, ...]
) -> Iterator[Target]:
    for spec in specs:
        text = os.fspath(spec)
        # An existing file takes precedence, because file names may hold commas and brackets.
        path = root / Path(text).expanduser()
        if isinstance(spec, str) and not os.path.lexists(path):
            parsed = parse_reference(spec)
            if parsed.kind in ("hf-hub", "open_clip"):
                yield Target(text, text)
                continue
            if parsed.kind == "local-dir":
                assert parsed.path is not None
                yield _folder_target(text, root / parsed.path)
                continue
            if _GLOB.search(text):
                matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - takes absolute ones
                if not matches:
                    yield Target(text, text, problem=f"{text}: no file matches")
                for match in matches:
                    yield from _at(Path(match), found, lists, explicit=False)
                continue
        elif not text:
            parse_reference(text)  # raises
        yield from _at(path, found, lists, explicit=True)


def _at(path: Path, found: Targets, lists: tuple[Path, ...], *, explicit: bool) -> Iterator[Target]:
    """Expand a path: a folder, a list, or a file."""
    if path.is_dir():
        inside = list(_walk(path, found))
        if not inside:
            found.ignored.append((str(path), "holds no weights files"))
        yield from inside
    elif explicit and path.suffix.lower() == LIST_SUFFIX:
        yield from _read_list(path, found, lists)
    elif explicit:
        yield _file_target(path)
    elif is_weights_name(path.name) or is_shard_index_name(path.name):
        index = index_of_shard(path.name)
        whole = None if index is None else path.with_name(index)
        # A glob that matches shards means their checkpoint, which the index names.
        yield _file_target(whole if whole is not None and whole.is_file() else path)
    else:
        found.ignored.append((str(path), NO_WEIGHTS))


def _read_list(path: Path, found: Targets, lists: tuple[Path, ...]) -> Iterator[Target]:
    resolved = path.resolve()
    if resolved in lists:
        raise UsageError(f"{path}: the list names itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the list cannot be read: {error}") from error
    lines = [line.strip() for line in lines_of(text)]
    specs = [line for line in lines if line and not line.startswith("#")]
    if not specs:
        raise UsageError(f"{path}: the list is empty; expected one target per line")
    yield from _expand(specs, found, path.parent, (*lists, resolved))


def _walk(top: Path, found: Targets) -> Iterator[Target]:
    """Yield every weights file below a folder, in the order of their names."""

    def unreadable(error: OSError) -> None:
        name = os.fsdecode(error.filename or "")
        problems.append(Target(name, name, problem=f"{name}: cannot be opened: {error.strerror}"))

    problems: list[Target] = []
    for folder, folders, files in os.walk(top, onerror=unreadable):
        folders.sort()
        for name in list(folders):
            inner = Path(folder) / name
            if inner.is_symlink():
                folders.remove(name)
                found.ignored.append((str(inner), "is a symbolic link to a folder"))
            elif name.startswith("."):
                folders.remove(name)
                found.ignored.append((str(inner), "is a hidden folder"))
            elif is_run(inner):
                folders.remove(name)
                found.ignored.append((str(inner), "is a run folder"))
        yield from _in_folder(Path(folder), sorted(files), found)
        yield from problems
        problems.clear()
    yield from problems


def _in_folder(folder: Path, files: list[str], found: Targets) -> Iterator[Target]:
    weights = []
    for name in files:
        index = index_of_shard(name)
        if is_shard_index_name(name):
            weights.append(name)
        elif not is_weights_name(name):
            found.ignored.append((str(folder / name), NO_WEIGHTS))
        elif is_training_state_name(name):
            found.ignored.append((str(folder / name), "is the state of a training, no weights"))
        elif index in files:
            found.ignored.append((str(folder / name), f"is a part of {index}"))
        else:
            weights.append(name)
    # In open_clip's layout, the main file of a folder gets the folder's name.
    main = _main_file(folder) if set(weights) & set(WEIGHT_NAMES) else None
    if main is not None and main.name in WEIGHT_NAMES:
        yield Target(str(folder), f"local-dir:{folder.absolute()}", str(main))
    for name in weights:
        if main is None or name != main.name or name not in WEIGHT_NAMES:
            yield _file_target(folder / name)


def _folder_target(name: str, folder: Path) -> Target:
    main = _main_file(folder)
    return Target(name, f"local-dir:{folder.absolute()}", None if main is None else str(main))


def _main_file(folder: Path) -> Path | None:
    """Return the main file of a folder; None if it is unclear. Reading it then says why."""
    with contextlib.suppress(CheckpointError):
        return find_weights(folder, folder_expected=True)
    return None


def _file_target(path: Path) -> Target:
    # Make the path absolute: workers may run elsewhere, and a relative `A,B` could be a name of
    # open_clip's.
    return Target(str(path), str(path.absolute()), str(path))


def _bucket(name: str, count: int) -> int:
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8], "little") % count
