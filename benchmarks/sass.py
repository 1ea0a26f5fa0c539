"""Loads in flight, counted in the machine code of a CUDA kernel.

What a thread can wait for at a time is what it has asked for before it needs the first of it. A GPU
executes a thread's instructions in order and stops at the first one whose operand has not arrived:
so the loads between are in flight together, and their number is a property of the code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
_LABEL = re.compile(r"^\.L_x_\d+:")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]*?)\s*;")
# `@!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10]`
_PARTS = re.compile(r"^(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*)$")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
_NO_FALL_THROUGH = ("EXIT", "RET", "BRA", "BRX", "JMP", "KILL")


@dataclass(frozen=True)
class Loads:
    """The most that one thread waits for at a time. widest: bytes of its widest load."""

    count: int
    bytes: int
    widest: int


def find_nvdisasm() -> str:
    """NVIDIA's disassembler: of the toolkit, or the one that comes with PyTorch's Triton."""
    home = os.environ.get("CUDA_HOME")
    packages = Path(sysconfig.get_path("purelib"))
    for candidate in (
        home and f"{home}/bin/nvdisasm",
        "nvdisasm",
        str(packages / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm"),
    ):
        path = candidate and shutil.which(candidate)
        if path:
            return path
    sys.exit("cuda_report: no nvdisasm in CUDA_HOME, on PATH or in the package triton")


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, list[str]]:
    """Return the lines of each kernel, by its mangled name."""
    text = subprocess.run(
        [nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    kernels: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+(\S+?),", line)
        if section:
            name = section[1]
            lines = kernels.setdefault(name[6:], []) if name.startswith(".text.") else None
        elif lines is not None:
            lines.append(line)
    return kernels


def loads_in_flight(lines: list[str], *, only_words: bool = False) -> Loads:
    """Find the most bytes of global loads that are under way before one of them is used.

    only_words: of loads of 16 bytes alone.

    Straight through the code as it stands: a branch that is not always taken is passed by, as it is
    where all elements exist; behind one that always is, nothing is under way any more.
    """
    best = Loads(0, 0, 0)
    waiting: dict[int, int] = {}  # first register of a load -> its bytes
    for predicated, opcode, written, read in _instructions(lines):
        used = [
            first
            for first, size in waiting.items()
            if any(first <= r < first + max(1, size // 4) for r in (*read, *written))
        ]
        if used or _ends(opcode):
            best = max(best, _sum(waiting), key=lambda loads: loads.bytes)
        for first in used:
            del waiting[first]
        if opcode.startswith("LDG"):
            width = next((w for mark, w in _WIDTHS.items() if mark in opcode), 4)
            if width == 16 or not only_words:
                waiting[written[0]] = width
        if _ends(opcode) and not predicated:
            waiting.clear()
    return max(best, _sum(waiting), key=lambda loads: loads.bytes)


def _sum(waiting: dict[int, int]) -> Loads:
    return Loads(len(waiting), sum(waiting.values()), max(waiting.values(), default=0))


def _ends(opcode: str) -> bool:
    return opcode.split(".")[0] in _NO_FALL_THROUGH


def _instructions(lines: list[str]) -> Iterator[tuple[bool, str, list[int], list[int]]]:
    """Whether predicated, opcode, registers written, registers read."""
    for line in lines:
        found = _INSTRUCTION.match(line)
        parts = found and _PARTS.match(found["text"])
        if not parts:
            continue
        opcode, operands = parts["opcode"], parts["operands"]
        predicated = found is not None and found["text"].startswith("@")
        first, _, rest = operands.partition(",")
        stores = opcode.startswith(("ST", "RED", "ATOM", "BAR", "EXIT", "BRA"))
        target = _REGISTER.fullmatch(first.strip())
        written = [] if stores or not target else _span(target, _result_width(opcode))
        sources = operands if stores or not target else rest
        width = _operand_width(opcode)
        read = [r for m in _REGISTER.finditer(sources) for r in _span(m, 2 if m[2] else width)]
        yield predicated, opcode, written, read


def _span(register: re.Match[str], width: int) -> list[int]:
    return list(range(int(register[1]), int(register[1]) + width))


def _result_width(opcode: str) -> int:
    """Registers of a result."""
    for mark, size in ((".128", 4), (".64", 2)):
        if mark in opcode:
            return size
    return 2 if opcode.startswith(("D", "IMAD.WIDE", "F2F.F64")) else 1


def _operand_width(opcode: str) -> int:
    """Registers of an operand that does not say so itself."""
    if opcode.startswith("ST"):
        return next((size for mark, size in ((".128", 4), (".64", 2)) if mark in opcode), 1)
    return 2 if opcode.startswith(("D", "F2F.F32.F64", "F2F.F16.F64")) else 1
