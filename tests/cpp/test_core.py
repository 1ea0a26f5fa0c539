"""Builds and runs the C++ tests of csrc/core with the compiler that the package was built with."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("flags", [("-O0",), ("-O2",), ("-O2", "-fsanitize=undefined")])
def test_core(tmp_path: Path, flags: tuple[str, ...]) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler is not None, "no C++ compiler on PATH, which building pydetox needs too"
    program = tmp_path / "core_test"
    command = [compiler, "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", *flags]
    source = ROOT / "tests" / "cpp" / "core_test.cpp"
    subprocess.run([*command, f"-I{ROOT}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "runtime error" not in result.stderr, result.stderr
