"""Writing files and folders so that nobody ever sees half of one.

Everything is written under a temporary name in the same directory (a rename cannot cross file
systems), flushed to the disk and then renamed. A full disk or Ctrl-C removes the temporary name
again, and what was there before stays as it was. SIGKILL and a power cut can leave the temporary
name behind, but they change nothing under the real name either.

A folder that is not empty is replaced by exchanging the two names, which Linux does in one step on
local file systems (ext4, XFS, Btrfs, tmpfs, overlayfs). Where the file system cannot do that (NFS,
FAT), the old folder is moved aside to ``.NAME.….old`` before the new one gets the name. If the
process is killed between these two steps, nothing is lost: the next write to the same path moves
the old folder back first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NoReturn

from pydetox.errors import OutputError

_REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EEXIST: "a part of the path is a file, not a directory",
    errno.EISDIR: "it is a directory, not a file",
    errno.ENAMETOOLONG: "the name is too long",
}


def output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """Make the one-line :class:`OutputError` for an ``OSError`` met while writing ``path``."""
    reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
    return OutputError(f"{os.fspath(path)}: cannot be written: {reason}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file for writing that appears under ``path``, complete, when the block ends.

    Missing parent directories are created. A symbolic link is followed: the file it names is
    replaced.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is false, is not a regular file, or cannot be
            written.
    """
    target = Path(os.path.realpath(path))
    try:
        _refuse_existing_file(path, target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(target)
        # Created with the permissions any new file gets: those of `tempfile` would be private to
        # this user.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _refuse_existing_file(path, target, overwrite)
        temporary.replace(target)
        _fsync_directory(target.parent)
    except OSError as error:
        _translate(error, path, temporary)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_file(path: str | os.PathLike[str], data: bytes | str, *, overwrite: bool = True) -> Path:
    """Write ``data`` (text as UTF-8) to ``path`` atomically; see :func:`atomic_file`."""
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    replaceable: Collection[str] | None = None,
) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes ``path``, as a whole, when the block ends.

    Args:
        path: The directory to create. An empty directory that is already there is taken over.
        overwrite: Replace a directory that has something in it.
        replaceable: With ``overwrite``: the only names the old directory may hold. Anything else in
            it belongs to somebody else, and the directory is not replaced. ``None`` allows any
            name.

    Raises:
        OutputError: The directory exists and may not be replaced, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        _bring_back(target)
        _refuse_existing_directory(path, target, overwrite, replaceable)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(target)
        temporary.mkdir()
    except OSError as error:
        raise output_error(path, error) from error
    try:
        yield temporary
        _fsync_tree(temporary)
        _refuse_existing_directory(path, target, overwrite, replaceable)
        _replace_directory(temporary, target)
        _fsync_directory(target.parent)
    except OSError as error:
        _translate(error, path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_foreign_folder(
    folder: str | os.PathLike[str], own: Collection[str], marks: Mapping[str, str]
) -> None:
    """Refuse a folder whose files would be replaced one by one, though somebody else wrote them.

    Args:
        folder: The folder to write to. It need not exist.
        own: The names that are written there.
        marks: Names of files, and regular expressions for how they begin. One of them shows that
            the folder was written in the same way before.

    Raises:
        OutputError: It has some of those names, and no mark.
    """
    there = sorted(name for name in own if os.path.lexists(Path(folder) / name))
    if there and not any(_begins(Path(folder) / name, how) for name, how in marks.items()):
        raise OutputError(
            f"{os.fspath(folder)}: holds {there[0]!r} of somebody else, which would be replaced; "
            "name another folder"
        )


def _begins(path: Path, pattern: str) -> bool:
    try:
        with path.open("rb") as file:
            return re.match(pattern.encode(), file.read(4096)) is not None
    except OSError:
        return False


class _RehearsalOverError(Exception):
    """Ends a rehearsal before the rename."""


def rehearse_file(path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Do what `atomic_file` does up to the rename, and clean up: before work is invested.

    Raises what `atomic_file` raises.
    """
    try:
        with atomic_file(path, overwrite=overwrite):
            raise _RehearsalOverError
    except _RehearsalOverError:
        pass


def rehearse_directory(
    path: str | os.PathLike[str], *, overwrite: bool, replaceable: Collection[str]
) -> None:
    """Do what `atomic_directory` does up to the rename, and clean up: before work is invested.

    Raises what `atomic_directory` raises.
    """
    try:
        with atomic_directory(path, overwrite=overwrite, replaceable=replaceable):
            raise _RehearsalOverError
    except _RehearsalOverError:
        pass


def _translate(error: OSError, path: str | os.PathLike[str], temporary: Path) -> NoReturn:
    # The block inside may also fail to *read* something else: that error names another file and is
    # left alone.
    named = error.filename
    if named is None or os.fsdecode(named).startswith(str(temporary)):
        raise output_error(path, error) from error
    raise error


def _temporary_name(target: Path, suffix: str = ".tmp") -> Path:
    return target.with_name(f"{_temporary_start(target)}{secrets.token_hex(6)}{suffix}")


def _temporary_start(target: Path) -> str:
    # The start of the name is enough to recognise it, and keeps it below the 255 bytes a name may
    # have.
    start = os.fsencode(target.name)[:100].decode(errors="ignore")
    return f".{start}."


def _refuse_existing_file(shown: str | os.PathLike[str], target: Path, overwrite: bool) -> None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise OutputError(f"{os.fspath(shown)}: is a directory, expected the name of a file")
    if not stat.S_ISREG(mode):
        # Replacing /dev/null by a file is what "atomic" would mean here.
        raise OutputError(f"{os.fspath(shown)}: is not a regular file, so it is not replaced")
    if not overwrite:
        raise OutputError(f"{os.fspath(shown)}: exists already and is not overwritten")


def _refuse_existing_directory(
    shown: str | os.PathLike[str],
    target: Path,
    overwrite: bool,
    replaceable: Collection[str] | None,
) -> None:
    try:
        found = sorted(entry.name for entry in target.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if not os.path.lexists(target):
            raise  # one of its parents is the file
        raise OutputError(
            f"{os.fspath(shown)}: is a file, expected the name of a directory"
        ) from None
    if found and not overwrite:
        raise OutputError(
            f"{os.fspath(shown)}: exists already, with {len(found)} entries, and is not overwritten"
        )
    strange = [] if replaceable is None else [name for name in found if name not in replaceable]
    if strange:
        raise OutputError(
            f"{os.fspath(shown)}: also holds {strange[0]!r} ({len(strange)} such entries), so the "
            "directory is not "
            "replaced as a whole"
        )


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; return False where the system cannot do that.

    It is Linux's ``renameat2`` with ``RENAME_EXCHANGE`` (man 2 rename). Raises OSError when the
    system can exchange names, but not these.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    at_cwd, rename_exchange = -100, 2
    names = os.fsencode(first), os.fsencode(second)
    if function(at_cwd, names[0], at_cwd, names[1], ctypes.c_uint(rename_exchange)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY):
        return False  # this kernel or this file system does not know the flag
    raise OSError(number, os.strerror(number), os.fspath(first), None, os.fspath(second))


def _replace_directory(new: Path, target: Path) -> None:
    """Give ``new`` the name ``target``; an old ``target`` is deleted last."""
    try:
        new.rename(target)  # one atomic step when nothing, or an empty directory, is there
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if exchange(new, target):
        # What was replaced has the temporary name now, and is deleted like any temporary.
        return
    old = _temporary_name(target, ".old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _bring_back(target: Path) -> None:
    """Undo the first half of a replacement that was killed before its second half."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    start = _temporary_start(target)
    aside = [
        entry
        for entry in target.parent.iterdir()
        if entry.name.startswith(start) and entry.name.endswith(".old") and entry.is_dir()
    ]
    if len(aside) == 1:
        aside[0].rename(target)


def _fsync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _fsync_directory(Path(folder))


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
