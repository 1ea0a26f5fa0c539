"""Finds torch and pybind11 without importing them; as a program, prints them for CMake."""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple


class Torch(NamedTuple):
    root: Path
    version: str  # 2.10.0
    cuda: str | None  # 13.0; None for a torch without CUDA


def find_package(name: str) -> Path | None:
    """The package's folder, in an isolated build also that of the environment built for.

    pip hides the environment's packages from an isolated build, but runs it with the environment's
    interpreter, which knows where they are.
    """
    path = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = PathFinder.find_spec(name, path)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def find_torch() -> Torch | None:
    root = find_package("torch")
    if root is None:
        return None
    text = (root / "version.py").read_text()
    version = re.search(r"^__version__ = '(\d+(\.\d+)*)", text, re.MULTILINE)
    cuda = re.search(r"^cuda.*= '([0-9.]+)'", text, re.MULTILINE)
    return Torch(root, version[1] if version else "0", cuda[1] if cuda else None)


def main() -> None:
    torch, pybind11 = find_torch(), find_package("pybind11")
    for name, found in (("torch", torch), ("pybind11", pybind11)):
        if found is None:
            sys.exit(f"{sys.executable} has no {name}, which building pydetox needs: install it")
    print(*torch[:2], torch.cuda or "none", pybind11 / "share/cmake/pybind11", sep=";", end="")


if __name__ == "__main__":
    main()
