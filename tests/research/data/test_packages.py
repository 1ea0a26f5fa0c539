"""Archives of packages: made of names and contents alone, and checked whenever they are read."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pydetox.errors import DataError
from pydetox.research.data import packages
from pydetox.research.data.packages import (
    PACKAGES,
    Package,
    archive_path,
    cache_folder,
    fetch,
    is_fetched,
    open_archive,
    pack,
)

FILES = {"a/two.png": b"2", "a/one.png": b"1", "a/readme": b"no"}


def files(contents: dict[str, bytes]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for name, content in contents.items():
        yield name, lambda content=content: content  # type: ignore[misc]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unchecked = Package("toy", "npm", "toy@1", r"a/(?P<name>\w+\.png)", "")
    content = pack(unchecked, files(FILES))
    return replace(unchecked, sha256=hashlib.sha256(content).hexdigest())


def brings(monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes]) -> None:
    monkeypatch.setitem(packages._FETCH, "npm", lambda *_: files(contents))
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")


def test_an_archive_depends_on_names_and_contents_alone(package: Package) -> None:
    backwards = dict(reversed(FILES.items()))
    assert pack(package, files(FILES)) == pack(package, files(backwards))
    with zipfile.ZipFile(io.BytesIO(pack(package, files(FILES)))) as archive:
        assert archive.namelist() == ["one.png", "two.png"]


def test_fetching_keeps_what_is_used_and_checks_it(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    brings(monkeypatch, FILES)
    assert not is_fetched(package)
    assert fetch(package) == archive_path(package)
    assert is_fetched(package)
    with open_archive(package) as archive:
        assert archive.read("two.png") == b"2"
    # Once there, nothing is asked of the manager.
    monkeypatch.setitem(packages._FETCH, "npm", lambda *_: pytest.fail("fetched twice"))
    fetch(package)


def test_other_content_is_refused_and_not_kept(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    brings(monkeypatch, FILES | {"a/one.png": b"forged"})
    with pytest.raises(DataError, match=r"toy: what npm brought as toy@1 has SHA-256"):
        fetch(package)
    assert not is_fetched(package)


def test_a_damaged_archive_is_refused(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    brings(monkeypatch, FILES)
    path = fetch(package)
    path.write_bytes(path.read_bytes()[:-1])
    for read in (open_archive, fetch):
        with pytest.raises(DataError, match="delete it and fetch again"):
            read(package)


def test_what_is_missing_is_named(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"toy: not fetched .*make data"):
        open_archive(package)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(DataError, match=r"toy@1 of npm, but npm cannot be found"):
        fetch(package)
    with pytest.raises(DataError, match="none of the expected files"):
        pack(package, files({"b/one.png": b"1"}))


def test_links_of_a_tar_archive_are_left_out(package: Package) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("a/passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        content = pack(package, packages._of_tar(archive))
    assert hashlib.sha256(content).hexdigest() == package.sha256


def test_the_cache_folder_follows_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/pydetox")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "pydetox"


def test_every_package_has_a_checksum() -> None:
    assert len({one.name for one in PACKAGES}) == len(PACKAGES)
    assert all(len(one.sha256) == 64 for one in PACKAGES)
