"""The version of the code that computes results; it is part of their key."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from pathlib import Path

#: The other packages that results depend on: models, tokens of prompts, decoding of images, sums.
_LIBRARIES = ("torch", "open_clip_torch", "torchvision", "timm", "numpy", "pillow")


@functools.cache
def code_version() -> str:
    """Return "VERSION+DIGEST": pydetox's version and a hash of all code that computes results.

    The hash covers pydetox's sources and native code and the versions of the libraries below. A
    change of any of them invalidates kept results, which are then computed again.
    """
    package = Path(__file__).resolve().parent.parent
    hasher = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        counts = path.suffix in (".py", ".txt", ".json") or (
            path.suffix == ".so" and not path.name.startswith("_emulator")
        )
        if counts and path.is_file():
            hasher.update(f"{path.relative_to(package)}\0".encode())
            hasher.update(hashlib.sha256(path.read_bytes()).digest())
    for library in _LIBRARIES:
        hasher.update(f"{library} {_installed(library)}\0".encode())
    return f"{_installed('pydetox') or '0+source'}+{hasher.hexdigest()[:16]}"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
