from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pydetox.atomic import atomic_directory, atomic_file, exchange, output_error, write_file
from pydetox.errors import OutputError


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _fail_fsync(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)


def test_write_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "new" / "deep" / "a.txt", "ä")
    assert path.read_bytes() == "ä".encode()
    write_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert _names(path.parent) == ["a.txt"]


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_file(path) as file:
        file.write(b"x")
        assert not path.exists()
    assert path.read_bytes() == b"x"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = write_file(tmp_path / "a", b"")
        with atomic_directory(tmp_path / "d") as folder:
            (folder / "x").write_bytes(b"")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def test_file_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a", b"old")
    with pytest.raises(OutputError, match="exists already"):
        write_file(path, b"new", overwrite=False)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_failed_file_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = write_file(tmp_path / "a", b"old")
    _fail_fsync(monkeypatch, error)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_file(path, b"new")
    if expected is OutputError:
        assert str(caught.value) == f"{path}: cannot be written: no space left on the disk"
    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == ["a"]


def test_error_inside_the_block_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a") as file:
        file.write(bytes(1 // len(os.environ.get("", ""))))
    with pytest.raises(FileNotFoundError, match="another"), atomic_file(tmp_path / "a"):
        (tmp_path / "another that is read").read_bytes()
    assert _names(tmp_path) == []


@pytest.mark.parametrize("tail", ["x", "x/y/z"])
def test_parent_is_a_file(tmp_path: Path, tail: str) -> None:
    blocker = write_file(tmp_path / "file", b"old")
    for attempt in (
        lambda: write_file(blocker / tail, b""),
        lambda: atomic_directory(blocker / tail).__enter__(),
    ):
        with pytest.raises(OutputError, match="is a file, not a directory"):
            attempt()
    assert blocker.read_bytes() == b"old"


def test_unwritable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="a: cannot be written: no permission"):
        write_file(tmp_path / "a", b"")


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        write_file(tmp_path, b"")
    with pytest.raises(OutputError, match="not a regular file"):
        write_file("/dev/null", b"")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OutputError, match="not a regular file"):
        write_file(fifo, b"")


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    target = write_file(tmp_path / "target", b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_file(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_long_name(tmp_path: Path) -> None:
    assert write_file(tmp_path / ("ä" * 127), b"x").read_bytes() == b"x"
    with pytest.raises(OutputError, match="name is too long"):
        write_file(tmp_path / ("x" * 256), b"x")


def test_directory_appears_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "d"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not target.exists()
    assert _names(target) == ["a", "sub"]
    assert _names(target.parent) == ["d"]


def test_empty_directory_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "a").write_text("1")
    assert _names(tmp_path / "d") == ["a"]


def _old_directory(tmp_path: Path) -> Path:
    target = tmp_path / "d"
    target.mkdir()
    (target / "a").write_text("old")
    return target


def test_directory_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    target = _old_directory(tmp_path)
    with (
        pytest.raises(OutputError, match="exists already, with 1 entries"),
        atomic_directory(target),
    ):
        pass
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "b").write_text("new")
    assert _names(target) == ["b"]
    assert _names(tmp_path) == ["d"]


def test_directory_with_foreign_files_is_never_replaced(tmp_path: Path) -> None:
    target = _old_directory(tmp_path)
    (target / "thesis.tex").write_text("dear")
    with (
        pytest.raises(OutputError, match=r"also holds 'thesis\.tex'"),
        atomic_directory(target, overwrite=True, replaceable=["a"]),
    ):
        pass
    assert (target / "thesis.tex").read_text() == "dear"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_failed_directory_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = _old_directory(tmp_path)
    _fail_fsync(monkeypatch, error)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_directory(target, overwrite=True) as folder:
        (folder / "b").write_text("new")
    assert (target / "a").read_text() == "old"
    assert _names(tmp_path) == ["d"]


_KILLED_AT = """
import os, sys
from pathlib import Path
from pydetox import atomic

steps = int(sys.argv[2])
if sys.argv[3] == "cannot":
    atomic.exchange = lambda *_: False


def dying(real):
    def step(*args, **more):
        global steps
        steps -= 1
        if steps < 0:
            os._exit(9)
        return real(*args, **more)

    return step


Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)
if hasattr(atomic, "exchange"):
    atomic.exchange = dying(atomic.exchange)
with atomic.atomic_directory(sys.argv[1], overwrite=True) as folder:
    (folder / "b").write_text("new")
"""


def _replace_until_killed(target: Path, steps: int, *, exchange: str) -> int:
    """Replace a folder in a process that dies before its rename number `steps`, from 0."""
    return subprocess.run(
        [sys.executable, "-B", "-c", _KILLED_AT, str(target), str(steps), exchange],
        cwd=Path(__file__).parents[1],
    ).returncode


@pytest.mark.parametrize("steps", range(5))
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, steps: int
) -> None:
    target = _old_directory(tmp_path)
    code = _replace_until_killed(target, steps, exchange="can")
    assert _names(target) in (["a"], ["b"])
    assert _names(target) == ["b"] or code == 9


@pytest.mark.parametrize("steps", range(5))
def test_without_exchange_the_next_write_brings_the_old_folder_back(
    tmp_path: Path, steps: int
) -> None:
    target = _old_directory(tmp_path)
    code = _replace_until_killed(target, steps, exchange="cannot")
    if code == 0:
        assert _names(target) == ["b"]
        return
    with (
        pytest.raises(OutputError, match="exists already, with 1 entries"),
        atomic_directory(target),
    ):
        pass
    assert (target / "a").read_text() == "old"


def test_exchange_swaps_folders_and_says_what_fails(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "x").touch()
    if not exchange(first, second):
        pytest.skip("the file system of the temporary folder cannot exchange names")
    assert _names(second) == ["x"]
    assert _names(first) == []
    with pytest.raises(FileNotFoundError, match="third"):
        exchange(first, tmp_path / "third")


def test_failed_rename_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _old_directory(tmp_path)
    real = Path.rename
    calls = []

    def rename(self: Path, other: Path) -> Path:
        calls.append((self, other))
        if len(calls) == 3:  # new over old is refused, old moved aside, then this
            raise KeyboardInterrupt
        return real(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr("pydetox.atomic.exchange", lambda *_: False)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(target, overwrite=True) as folder,
    ):
        (folder / "b").write_text("new")
    assert len(calls) == 4
    assert (target / "a").read_text() == "old"
    assert _names(tmp_path) == ["d"]


def test_directory_where_a_file_is(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a", b"old")
    with pytest.raises(OutputError, match="is a file"), atomic_directory(path, overwrite=True):
        pass
    assert path.read_bytes() == b"old"


def test_unknown_error_keeps_its_own_words() -> None:
    assert "Input/output error" in str(output_error("x", OSError(errno.EIO, "Input/output error")))


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """A real failure of the operating system in the middle of a large write, not a simulated
    one.
    """
    path = write_file(tmp_path / "a", b"old")
    code = (
        "import sys; from pydetox.atomic import write_file; from pydetox.errors import "
        "OutputError\n"
        "try: write_file(sys.argv[1], bytes(1 << 20))\n"
        "except OutputError as error: print(error)"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert (
        done.stdout
        == f"{path}: cannot be written: the file would be larger than this process may write\n"
    )
    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == ["a"]
