"""What a machine without a network needs to run `make check-gpu`: wheels and two libraries.

python -m benchmarks.gpu.bundle [--arch 9.0] [--python 3.12] [--limit-mib 64]

Writes build/gpu-bundle: `bundle.json`, the wheels that such a machine may lack, and `_C.so` and
`_C_cuda.so`, the latter for one architecture alone, in the form that every torch from 2.10 loads.
Needs nvcc and an environment that can build pydetox; a GPU is not needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-bundle"
BUILD = ROOT / "build" / "gpu-bundle-build"
LIBRARIES = ("_C.so", "_C_cuda.so")
MIB = 1 << 20
#: Packages to take along, and the modules by whose absence they are missed. Where torch is, numpy
#: and what else torch needs are; the demo needs scikit-learn, which is too large to take.
PACKAGES = {
    "open_clip_torch": "open_clip",
    "ftfy": "ftfy",
    "wcwidth": "wcwidth",
    "timm": "timm",
    "safetensors": "safetensors",
    "click": "click",
    "rich": "rich",
    "markdown-it-py": "markdown_it",
    "mdurl": "mdurl",
    "pygments": "pygments",
    "pybind11": "pybind11",
    "pytest": "pytest",
    "iniconfig": "iniconfig",
    "pluggy": "pluggy",
}
# pip takes a wheel for exactly these; a machine with any of them runs those before it as well.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12, 5)]
_PLATFORMS += [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]


@dataclass(frozen=True)
class Wheel:
    """A wheel's file name and the module that it brings."""

    file: str
    module: str


@dataclass(frozen=True)
class Manifest:
    """bundle.json.

    Attributes:
        folder: Where it lies.
        architecture: Of the GPU code, `9.0`.
        commit: Of the sources that the libraries were built from.
        sources: Their digest (`source_digest`).
        torch: That they were built with.
        wheels: Those in the folder.
    """

    folder: Path
    architecture: str
    commit: str
    sources: str
    torch: str
    wheels: tuple[Wheel, ...]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return a folder's manifest, None where there is none."""
        file = folder / "bundle.json"
        if not file.is_file():
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
        wheels = tuple(Wheel(**wheel) for wheel in values.pop("wheels"))
        return cls(folder=folder, wheels=wheels, **values)

    def write(self) -> None:
        """Write bundle.json, last of all: a folder without it is no bundle."""
        values = {k: v for k, v in asdict(self).items() if k != "folder"}
        (self.folder / "bundle.json").write_text(json.dumps(values, indent=1) + "\n")


def download(python: str) -> tuple[Wheel, ...]:
    """Download the wheels for a version of Python, in the versions that the project pins."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    pip += ["--no-deps", "--only-binary=:all:", "--python-version", python]
    pip += ["--implementation", "cp", *(f"--platform={name}" for name in _PLATFORMS)]
    pip += ["-c", str(ROOT / "requirements" / "pins.txt")]
    wheels = []
    for package, module in PACKAGES.items():
        before = set(FOLDER.glob("*.whl"))
        subprocess.run([*pip, "-d", str(FOLDER), package], check=True)
        (new,) = set(FOLDER.glob("*.whl")) - before
        wheels.append(Wheel(new.name, module))
    return tuple(wheels)


def build(architecture: str) -> None:
    """Build the two libraries for one architecture, in a build folder of their own."""
    scripts = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=scripts) or "cmake"
    ninja = shutil.which("ninja", path=scripts) or "ninja"
    flags = ["-DPYDETOX_CUDA=ON", "-DPYDETOX_EMULATOR=OFF", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    flags += [f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {**os.environ, "PYDETOX_CUDA_ARCH_LIST": architecture}
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *flags],
        [cmake, "--build", str(BUILD), "--target", *(Path(n).stem for n in LIBRARIES)],
    ):
        subprocess.run(command, check=True, env=environment)
    for name in LIBRARIES:
        shutil.copyfile(BUILD / name, FOLDER / name)
        subprocess.run(["strip", "--strip-unneeded", str(FOLDER / name)], check=True)


def unstable_symbols(library: Path) -> list[str]:
    """Return what a library takes from torch's C++ interface, which changes between versions."""
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    names = re.findall(r" U (\S+)", _output(command))
    return [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def source_digest() -> str:
    """Return a digest of everything that the native libraries are made of."""
    digest = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt"]
    for folder, pattern in (("csrc", "*"), ("cmake", "*.cmake")):
        files += sorted(path for path in (ROOT / folder).rglob(pattern) if path.is_file())
    for file in files:
        digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def tree_bytes() -> int:
    """Return the size of the working tree's files that git knows or would add."""
    files = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = _output(["git", "-C", str(ROOT), *files]).split("\0")
    return sum((ROOT / n).stat().st_size for n in names if n and (ROOT / n).is_file())


def main() -> int:
    """Make the bundle, check it, and print what to do with it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="9.0", help="compute capability of the GPU")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--limit-mib", type=float, default=64, help="most that may travel")
    options = parser.parse_args()
    from .machine import commit  # which needs Manifest

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    wheels = download(options.python)
    build(options.arch)
    for name in LIBRARIES:
        if unstable := unstable_symbols(FOLDER / name):
            print(f"gpu-bundle: {name} takes {', '.join(unstable[:3])} from torch", file=sys.stderr)
            return 1
    import torch

    Manifest(
        FOLDER, options.arch, commit() or "unknown", source_digest(), torch.__version__, wheels
    ).write()
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    total = size + tree_bytes()
    folder = FOLDER.relative_to(ROOT)
    print(f"{folder}: {size / MIB:.1f} MiB; with the working tree {total / MIB:.1f} MiB")
    if total > options.limit_mib * MIB:
        print(f"gpu-bundle: more than {options.limit_mib:.0f} MiB", file=sys.stderr)
        return 1
    print(f"On the machine, in the copied tree: python3 -m benchmarks.gpu --bundle {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
