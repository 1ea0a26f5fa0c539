"""From what was asked for to a list of checkpoints.

Nothing is left out silently: what a folder or a list holds beside checkpoints is kept in
`Targets.ignored`, each with the reason.
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

from ..checkpoints import parse_reference
from ..checkpoints.architecture import CONFIG_NAME
from ..checkpoints.hub import fetch_pretrained, fetch_repository
from ..checkpoints.sources import WEIGHT_NAMES
from ..errors import CheckpointError, UsageError
from .store import is_run

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
LIST_SUFFIX = ".txt"
_INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.\w+)")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Target:
    """One checkpoint to scan.

    Attributes:
        name: As it stands in reports; different for each target.
        reference: What `load_checkpoint` takes.
        path: The weights file, None for what is not on the disk yet.
        problem: Why it cannot be scanned, known without looking into it.
    """

    name: str
    reference: str
    path: str | None = None
    problem: str | None = None

    def signature(self) -> tuple[int, ...] | None:
        """Return size, times and inode of the weights and of the configuration beside them.

        None when there is no such file. The time of the inode's change cannot be set by a program,
        so that a file with the same signature is the same file.
        """
        if self.path is None:
            return None
        try:
            found = [Path(self.path).stat()]
        except (OSError, ValueError):
            return None
        beside = Path(self.path).parent / CONFIG_NAME
        with contextlib.suppress(OSError, ValueError):
            found.append(beside.stat())
        return tuple(
            number
            for s in found
            for number in (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)
        )


@dataclass
class Targets:
    """Checkpoints in order, and what was passed over: (name, reason)."""

    targets: list[Target] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    other_shards: int = 0


def find_targets(
    specs: Iterable[str | os.PathLike[str]], *, shard: tuple[int, int] | None = None
) -> Targets:
    """Expand what a user named.

    specs: weights files, folders (searched through all levels), globs (`**` too), lists
    (`models.txt`: one of these per line, relative to the list, `#` begins a comment),
    `local-dir:folder`, `hf-hub:org/repo[@revision]`, `MODEL,TAG` of open_clip.
    shard: (i, n): keep the targets whose name hashes to i - 1 modulo n, so that n machines with the
    same list share the work, and go on sharing it in the same way when the list grows.

    A name that comes twice is taken once. Raises UsageError for a name that has no meaning, and for
    a list that cannot be read.
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


def resolve_weights(reference: str, *, offline: bool) -> Path:
    """Return the weights file that a name means, downloading it if need be.

    Raises what `load_checkpoint` raises when there is none.
    """
    parsed = parse_reference(reference)
    if parsed.model is not None and parsed.tag is not None:
        return fetch_pretrained(parsed.model, parsed.tag, cache_dir=None, offline=offline)[0]
    if parsed.repository is not None:
        return fetch_repository(
            parsed.repository, parsed.revision, cache_dir=None, offline=offline
        )[0]
    assert parsed.path is not None
    if not parsed.path.is_dir():
        return parsed.path
    names = sorted(entry.name for entry in parsed.path.iterdir())
    candidates = [n for n in WEIGHT_NAMES if n in names] or [n for n in names if _is_weights(n)]
    if not candidates:
        raise CheckpointError(f"{parsed.path}: holds no weights")
    return parsed.path / candidates[0]


def _expand(
    specs: Iterable[str | os.PathLike[str]], found: Targets, root: Path, lists: tuple[Path, ...]
) -> Iterator[Target]:
    for spec in specs:
        text = os.fspath(spec)
        # A file of that name comes first: names may hold commas and brackets.
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
    """Expand what is at a path: a folder, a list, or a file."""
    if path.is_dir():
        inside = list(_walk(path, found))
        if not inside:
            found.ignored.append((str(path), "holds no weights files"))
        yield from inside
    elif explicit and path.suffix.lower() == LIST_SUFFIX:
        yield from _read_list(path, found, lists)
    elif explicit or _is_weights(path.name):
        yield _file_target(path)
    else:
        found.ignored.append((str(path), "is no weights file by its name"))


def _read_list(path: Path, found: Targets, lists: tuple[Path, ...]) -> Iterator[Target]:
    resolved = path.resolve()
    if resolved in lists:
        raise UsageError(f"{path}: the list names itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the list cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    specs = [line for line in lines if line and not line.startswith("#")]
    if not specs:
        raise UsageError(f"{path}: the list names nothing")
    yield from _expand(specs, found, path.parent, (*lists, resolved))


def _walk(top: Path, found: Targets) -> Iterator[Target]:
    """Every weights file below a folder, in the order of their names."""

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
        shard = _SHARD.fullmatch(name)
        if name.endswith(_INDEX_SUFFIX):
            weights.append(name)
        elif not _is_weights(name):
            found.ignored.append((str(folder / name), "is no weights file by its name"))
        elif shard and f"{shard['stem']}{shard['suffix']}{_INDEX_SUFFIX}" in files:
            index = f"{shard['stem']}{shard['suffix']}{_INDEX_SUFFIX}"
            found.ignored.append((str(folder / name), f"is a part of {index}"))
        else:
            weights.append(name)
    # The file that the folder itself means, in open_clip's layout, goes by the folder's name.
    main = next((name for name in WEIGHT_NAMES if name in weights), None)
    if main is not None:
        yield _folder_target(str(folder), folder)
    for name in weights:
        if name != main:
            yield _file_target(folder / name)


def _folder_target(name: str, folder: Path) -> Target:
    reference = f"local-dir:{folder.absolute()}"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return Target(name, reference)  # reading it will say why
    main = next((n for n in WEIGHT_NAMES if n in names), None)
    if main is None:
        candidates = list(filter(_is_weights, names))
        main = candidates[0] if len(candidates) == 1 else None
    return Target(name, reference, None if main is None else str(folder / main))


def _file_target(path: Path) -> Target:
    # Absolute: workers may run elsewhere, and a relative `A,B` could be a name of open_clip's.
    return Target(str(path), str(path.absolute()), str(path))


def _is_weights(name: str) -> bool:
    return name.lower().endswith(WEIGHT_SUFFIXES)


def _bucket(name: str, count: int) -> int:
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8], "little") % count
