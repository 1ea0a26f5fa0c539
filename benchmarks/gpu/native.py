"""Python packages and native libraries where nothing can be fetched and the project is not set up.

With a bundle (see `bundle`) a machine needs only torch, a C++ compiler, CMake, Ninja and pybind11:
the packages that it lacks come from wheels, the operators from libraries that fit every Python and
every torch from 2.10. `_native`, which is bound to a version of Python, is compiled there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .bundle import LIBRARIES, Manifest
from .processes import ROOT

PACKAGE = ROOT / "pydetox"
BUILD = ROOT / "build" / "gpu-native"
SITE = ROOT / "build" / "gpu-site"
_SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


def needs_build() -> bool:
    """Whether this interpreter has no native module of pydetox here."""
    return not (PACKAGE / f"_native{_SUFFIX}").is_file()


def install_missing(manifest: Manifest) -> list[str]:
    """Install the wheels of packages that this interpreter lacks into SITE; return their names.

    SITE goes in front of the path. open_clip uses transformers where it finds one, whatever its
    version, and needs it for no model here: it is hidden.
    """
    missing = [wheel for wheel in manifest.wheels if importlib.util.find_spec(wheel.module) is None]
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        pip += ["--no-compile", "--no-cache-dir", "--target", str(SITE)]
        subprocess.run([*pip, *(str(manifest.folder / w.file) for w in missing)], check=True)
    (SITE / "transformers.py").write_text('raise ImportError("left out of make check-gpu")\n')
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return [wheel.module for wheel in missing]


def take_libraries(manifest: Manifest) -> None:
    """Put the bundle's libraries into the package."""
    for name in LIBRARIES:
        shutil.copyfile(manifest.folder / name, PACKAGE / name)


def configure_command(cuda: str, architectures: str) -> list[str]:
    """Return the command that configures BUILD; CMakeLists.txt knows everything else."""
    variables = {
        "Python_EXECUTABLE": sys.executable,
        "PYDETOX_CUDA": cuda,
        "PYDETOX_EMULATOR": "OFF",
    }
    return [
        "env",
        f"PYDETOX_CUDA_ARCH_LIST={architectures}",
        _tool("cmake"),
        *("-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
        *(f"-D{name}={value}" for name, value in variables.items()),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
    ]


def native_module_commands() -> Iterator[list[str]]:
    """Yield the commands that build `_native` alone, against the `_C.so` in the package.

    Call it when BUILD is configured. Its target would build `_C` first, which takes minutes; its
    objects do not need that. CMake's list of commands names them.
    """
    entries = json.loads((BUILD / "compile_commands.json").read_text(encoding="utf-8"))
    commands = [shlex.split(entry["command"]) for entry in entries]
    # Older versions of CMake name a command's output in the command alone.
    outputs = {words[words.index("-o") + 1]: words[0] for words in commands}
    objects = [name for name in outputs if name.startswith("CMakeFiles/_native.dir/")]
    if not objects:
        raise RuntimeError(f"{BUILD}/compile_commands.json names no object of _native")
    compiler = outputs[objects[0]]
    yield [_tool("ninja"), "-C", str(BUILD), *objects]
    paths = [str(BUILD / name) for name in objects]
    target = PACKAGE / f"_native{_SUFFIX}"
    yield [
        compiler,
        "-shared",
        *paths,
        str(PACKAGE / "_C.so"),
        "-Wl,-rpath,$ORIGIN",
        "-o",
        str(target),
    ]


def build_commands(prefix: Path) -> Iterator[list[str]]:
    """Yield the commands that build everything in BUILD and install it to a folder."""
    cmake = _tool("cmake")
    yield [cmake, "--build", str(BUILD)]
    yield [cmake, "--install", str(BUILD), "--prefix", str(prefix), "--component", "pydetox"]


def together(commands: list[list[str]]) -> list[str]:
    """Return one command that runs them in turn and ends with the first that fails."""
    return ["sh", "-ec", "\n".join(shlex.join(command) for command in commands)]


def _tool(name: str) -> str:
    """Return a build tool's path: beside the interpreter, whose environment need not be active."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which(name, path=path) or name


def main() -> None:
    """Build `_native` alone; a process of its own, because it reads what the one before wrote."""
    for command in native_module_commands():
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
