"""Turns environment variables into a CMake call; CMakeLists.txt knows everything else.

PYDETOX_CUDA=AUTO|ON|OFF         build the CUDA library (AUTO: where nvcc and a CUDA torch are)
PYDETOX_CUDA_ARCH_LIST="8.0 9.0+PTX"  for these GPUs (or TORCH_CUDA_ARCH_LIST, as torch spells it)
PYDETOX_EMULATOR=ON|OFF          build what only tests use (default: ON for `pip install -e`)
PYDETOX_WERROR=ON|OFF            compiler warnings are errors
MAX_JOBS=n                       parallel compilations
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Find a build tool beside the interpreter (its environment may not be active) or on PATH."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"pydetox: building needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Builds the native libraries with CMake and Ninja; the next build continues in its folder."""

    def run(self) -> None:
        in_place = bool(self.inplace or self.editable_mode)
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / "pydetox"
        emulator = os.environ.get("PYDETOX_EMULATOR", "ON" if in_place else "OFF")
        kind = "editable" if in_place else "wheel"
        build = ROOT / "build" / f"cmake-{kind}-{sys.implementation.cache_tag}"
        ninja = tool("ninja")
        flags = {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": ninja,
            "PYDETOX_CUDA": os.environ.get("PYDETOX_CUDA", "AUTO"),
            "PYDETOX_EMULATOR": emulator,
            "PYDETOX_WERROR": os.environ.get("PYDETOX_WERROR", "OFF"),
        }
        configure = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        self.cmake(*configure, *(f"-D{name}={value}" for name, value in flags.items()))
        self.cmake("--build", str(build), *jobs)
        self.cmake("--install", str(build), "--prefix", str(target), "--component", "pydetox")

    @staticmethod
    def cmake(*arguments: str) -> None:
        try:
            subprocess.run([tool("cmake"), *arguments], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"pydetox: {' '.join(map(str, error.cmd))} failed; its messages are above")

    def get_outputs(self) -> list[str]:
        return sorted(str(path) for path in (Path(self.build_lib) / "pydetox").glob("*.so"))

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The extension's name only tells setuptools that the wheel is platform-specific.
setup(ext_modules=[Extension("pydetox._C", [])], cmdclass={"build_ext": CMakeBuild})
