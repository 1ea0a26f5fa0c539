"""Print torch's folder, version and CUDA version ("none") and pybind11's CMake folder."""

import importlib.util
import re
import sys
from pathlib import Path


def main() -> None:
    folders = {}
    for package in ("torch", "pybind11"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(
                f"{sys.executable} has no {package}, which building pydetox needs: "
                f"install it, or build without --no-build-isolation"
            )
        folders[package] = Path(spec.origin).parent
    text = (folders["torch"] / "version.py").read_text()
    version = re.search(r"^__version__ = '([0-9.]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda.*= '([0-9.]+)'", text, re.MULTILINE)
    if version is None:
        sys.exit(f"cannot read torch's version from {folders['torch'] / 'version.py'}")
    pybind11 = folders["pybind11"] / "share" / "cmake" / "pybind11"
    fields = (folders["torch"], version[1].rstrip("."), cuda[1] if cuda else "none", pybind11)
    print(*fields, sep=";", end="")


if __name__ == "__main__":
    main()
