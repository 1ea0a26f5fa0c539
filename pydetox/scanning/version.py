"""What code computes the results: part of the key under which they are kept."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from pathlib import Path


@functools.cache
def code_version() -> str:
    """Return "VERSION+DIGEST": of pydetox, and of its sources and native code and torch's version.

    An edit of any of them makes kept results invalid: better computed again than wrong.
    """
    package = Path(__file__).resolve().parent.parent
    hasher = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        counts = path.suffix in (".py", ".txt", ".json") or (
            path.suffix == ".so" and path.name.startswith("_C")
        )
        if counts and path.is_file():
            hasher.update(f"{path.relative_to(package)}\0".encode())
            hasher.update(hashlib.sha256(path.read_bytes()).digest())
    hasher.update(metadata.version("torch").encode())
    try:
        version = metadata.version("pydetox")
    except metadata.PackageNotFoundError:
        version = "0+source"
    return f"{version}+{hasher.hexdigest()[:16]}"
