"""What the CUDA kernels need of a GPU, found without one.

Compiles csrc/cuda for each architecture and prints, per kernel: registers, spilled bytes, shared
memory and threads of a block, theoretical occupancy; then the bytes that each launch must move and
the time that they take at an H100's bandwidth, as a prediction. Needs nvcc and a build with the
emulator, which knows the launch shapes. Exits with 1 if a kernel spills registers.

    python benchmarks/cuda_report.py [--arch 80 --arch 90] [--update-docs]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydetox import _emulator

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # those of CMakeLists.txt that change code
H100_BYTES_PER_SECOND = 3.35e12  # SXM5, NVIDIA's data sheet
DTYPES = {
    "unsigned char": "uint8",
    "pydetox::BFloat16": "bfloat16",
    "float": "float32",
    "double": "float64",
}
DTYPE_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4, "float64": 8}
# Weights of ViT-B-32's image tower, and what the benchmarks do with them: operation, lists, and how
# many of them are read and written.
WEIGHTS = 87_849_216
WEIGHT_PROBLEMS = [
    ("gram", "8 models", 9, 9, 0),
    ("project", "16 directions", 18, 18, 0),
    ("sketch", "to 4,096", 2, 2, 0),
    ("matmul", "width 32, weights alone", 2, 2, 0),
    ("apply", "1 vector, in place", 3, 2, 1),
]
# The operation that launches a kernel.
WEIGHT_KERNELS = {
    "gram_chunks": "gram",
    "project_chunks": "project",
    "sketch_chunks": "sketch",
    "matmul_right": "matmul",
    "matmul_left": "matmul",
    "apply_chunks": "apply",
}
# K, B, D, C of the objectives and K, C, H, W of the update, as the benchmarks have them.
OBJECTIVE_SIZES = [10, 16, 512, 1000]
MANY_DIMENSIONS = [10, 16, 2048, 1000]  # take one row at a time
UPDATE_SIZES = [8, 3, 224, 224]
# K, B, C, H, W of the benchmarks.
PROBLEMS = [(8, 16, 3, 224, 224), (64, 16, 3, 64, 64)]


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65_536
    register_unit: int = 256  # registers are given to a warp in units of this
    warp_unit: int = 4  # and warps to a block in multiples of the scheduler count
    reserved_shared_bytes: int = 1024  # of each block, for the system

    def occupancy(self, threads: int, registers: int, shared_bytes: int) -> float:
        """Resident warps over the most there can be, for blocks of this kind."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // self.register_unit) * self.register_unit
        by_registers = self.registers // per_warp // self.warp_unit * self.warp_unit // warps
        shared = -(-(shared_bytes + self.reserved_shared_bytes) // 128) * 128
        blocks = min(self.blocks, self.warps // warps, by_registers, self.shared_bytes // shared)
        return blocks * warps / self.warps


MULTIPROCESSORS = {"80": Multiprocessor(164 * 1024), "90": Multiprocessor(228 * 1024)}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; types and numbers are its template arguments."""

    arch: str
    name: str
    types: tuple[str, str, str]  # compute, image, output or its gradient
    pixels: int
    run: int
    channels: int  # 0: does not matter
    cropped: bool
    registers: int
    spilled_bytes: int

    def launch(self) -> tuple[int, int]:
        """Threads and shared bytes of a block, at a batch of 16 images."""
        channels = {3: 3, 0: 3}.get(self.channels, 4)
        patch = 0 if self.run > 1 else 1  # patches of one pixel leave no run for vectors
        sizes = [1, 16, channels, 64, 64, patch]
        box = [32, 32] if self.cropped else []
        _, threads, shared = _emulator.stamp_launch_shape(
            self.name == "stamp_backward", sizes, *self.types, box=box
        )
        return threads, shared


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    for candidate in (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"):
        path = candidate and shutil.which(candidate)
        if path:
            return path
    sys.exit("cuda_report: no nvcc in CUDACXX, in CUDA_HOME or on PATH")


def compiler_log(nvcc: str, arch: str, source: Path) -> str:
    """Compiles a .cu file; returns what ptxas says about each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-I{ROOT}", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        result = subprocess.run(
            [*command, str(source), "-o", f"{folder}/out.cubin"],
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        sys.exit(f"cuda_report: nvcc failed on {source.name}:\n{result.stderr}")
    return subprocess.run(
        ["c++filt"], input=result.stdout + result.stderr, capture_output=True, text=True
    ).stdout


def compile_kernels(nvcc: str, arch: str) -> Iterator[Kernel]:
    """The kernels of stamping, from what ptxas says about each."""
    for source in sorted((ROOT / "csrc" / "cuda").glob("stamp*.cu")):
        log = compiler_log(nvcc, arch, source)
        pattern = re.compile(
            r"Function properties for void pydetox::cuda::(\w+)<([^>]*)>.*?"
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            re.DOTALL,
        )
        for name, arguments, stores, loads, registers in pattern.findall(log):
            compute, image, output, *numbers, places = [a.strip() for a in arguments.split(",")]
            pixels, run, *channels = [int(n) for n in numbers]
            yield Kernel(
                arch,
                name,
                (DTYPES[compute], DTYPES[image], DTYPES[output]),
                pixels,
                run,
                channels[0] if channels else 0,
                places.endswith("CropPlaces"),
                int(registers),
                int(stores) + int(loads),
            )


@dataclass(frozen=True)
class WeightKernel:
    """One compiled kernel over lists of weights."""

    arch: str
    name: str
    registers: int
    spilled_bytes: int

    def launch(self) -> tuple[int, int]:
        """Threads and shared bytes of a block."""
        operation = WEIGHT_KERNELS.get(self.name)
        if operation is None:  # the small ones after the sums
            return 256, 0
        lists = {name: lists for name, _, lists, _, _ in WEIGHT_PROBLEMS}[operation]
        _, threads, shared = _emulator.weight_launch_shapes(operation, WEIGHTS, lists)[0]
        return threads, shared


def compile_weight_kernels(nvcc: str, arch: str) -> Iterator[WeightKernel]:
    pattern = re.compile(
        r"Function properties for pydetox::cuda::(\w+)\(.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    log = compiler_log(nvcc, arch, ROOT / "csrc" / "cuda" / "weights.cu")
    for name, stores, loads, registers in pattern.findall(log):
        yield WeightKernel(arch, name, int(registers), int(stores) + int(loads))


def weight_kernel_table(kernels: list[WeightKernel]) -> Iterator[str]:
    rows: dict[str, list[WeightKernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, []).append(kernel)
    archs = "/".join(f"sm_{kernel.arch}" for kernel in next(iter(rows.values())))
    yield f"| kernel | threads | shared | registers {archs} | spilled | occupancy {archs} |"
    yield "|---" * 6 + "|"
    for name, same in rows.items():
        threads, shared = same[0].launch()
        registers = " / ".join(str(k.registers) for k in same)
        spilled = " / ".join(str(k.spilled_bytes) for k in same)
        occupancy = " / ".join(
            f"{MULTIPROCESSORS[k.arch].occupancy(threads, k.registers, shared):.0%}" for k in same
        )
        yield f"| {name} | {threads} | {shared} | {registers} | {spilled} | {occupancy} |"


def weight_traffic_table() -> Iterator[str]:
    yield "| operation | float32 weights | must move | at 3.35 TB/s (prediction) |"
    yield "|---" * 4 + "|"
    for operation, what, _, reads, writes in WEIGHT_PROBLEMS:
        total = (reads + writes) * WEIGHTS * 4
        seconds = total / H100_BYTES_PER_SECOND
        yield (
            f"| {operation}, {what} | {WEIGHTS / 1e6:.1f} M | {total / 1e9:.2f} GB "
            f"| {seconds * 1e3:.2f} ms |"
        )


@dataclass(frozen=True)
class SearchKernel:
    """One compiled kernel of the objectives or the update."""

    arch: str
    name: str
    arguments: str  # of the template
    registers: int
    spilled_bytes: int

    def launch(self) -> tuple[int, int]:
        """Threads and shared bytes of a block, for float32."""
        sizes = MANY_DIMENSIONS if self.arguments.endswith(", 1") else OBJECTIVE_SIZES
        norms, sums, gradients = _emulator.objective_launch_shapes("collapse", sizes)
        _, rows, mean, scale = _emulator.objective_launch_shapes("zero_shot", sizes)
        masks, plans, triggers = _emulator.trigger_update_launch_shapes(UPDATE_SIZES)
        _, threads, shared = {
            "invert_norms": norms,
            "sum_unit_rows": sums,
            "collapse_gradients": gradients,
            "zero_shot_rows": rows,
            "mean_of_rows": mean,
            "scale_triggers": scale,
            "update_masks": masks,
            "update_plans": plans,
            "update_triggers": triggers,
        }[self.name]
        if self.name == "zero_shot_rows" and "double" in self.arguments:
            shared *= 2  # all of it is of the type of z
        return threads, shared


def compile_search_kernels(nvcc: str, arch: str) -> Iterator[SearchKernel]:
    pattern = re.compile(
        r"Function properties for (?:void )?pydetox::cuda::(\w+)(?:<([^>]*)>)?\(.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for source in ("objectives.cu", "trigger_update.cu"):
        log = compiler_log(nvcc, arch, ROOT / "csrc" / "cuda" / source)
        for name, arguments, stores, loads, registers in pattern.findall(log):
            yield SearchKernel(arch, name, arguments, int(registers), int(stores) + int(loads))


def search_kernel_table(kernels: list[SearchKernel]) -> Iterator[str]:
    rows: dict[tuple[str, str], list[SearchKernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.name, kernel.arguments), []).append(kernel)
    archs = "/".join(f"sm_{kernel.arch}" for kernel in next(iter(rows.values())))
    yield f"| kernel | threads | shared | registers {archs} | spilled | occupancy {archs} |"
    yield "|---" * 6 + "|"
    for (name, arguments), same in sorted(rows.items()):
        threads, shared = same[0].launch()
        registers = " / ".join(str(k.registers) for k in same)
        spilled = " / ".join(str(k.spilled_bytes) for k in same)
        occupancy = " / ".join(
            f"{MULTIPROCESSORS[k.arch].occupancy(threads, k.registers, shared):.0%}" for k in same
        )
        full = f"{name}<{arguments}>" if arguments else name
        yield f"| {full} | {threads} | {shared} | {registers} | {spilled} | {occupancy} |"


def search_traffic_table() -> Iterator[str]:
    yield "| operation | float32 | must move | at 3.35 TB/s (prediction) |"
    yield "|---" * 4 + "|"
    k, b, d, c = OBJECTIVE_SIZES
    z, head = 4 * k * b * d, 4 * c * d
    triggers, channels, height, width = UPDATE_SIZES
    pixels = 4 * triggers * height * width
    for operation, sizes, total in (
        ("embedding_collapse and its gradient", f"{k}×{b}×{d}", 3 * z),
        ("zero_shot_loss with its gradient", f"{k}×{b}×{d}, {c:,} classes", 2 * z + head),
        (
            "trigger_update",
            f"{triggers}×{channels}×{height}×{width}",
            7 * (1 + channels) * pixels + pixels,  # and the masks once more, for their norms
        ),
    ):
        seconds = total / H100_BYTES_PER_SECOND
        yield f"| {operation} | {sizes} | {total / 1e6:.1f} MB | {seconds * 1e6:.1f} µs |"


def kernel_table(kernels: list[Kernel]) -> Iterator[str]:
    """One row per kernel; figures that depend on the architecture side by side."""
    rows: dict[tuple[object, ...], list[Kernel]] = {}
    for kernel in kernels:
        key = (
            kernel.name,
            kernel.types,
            kernel.pixels,
            kernel.run,
            kernel.channels,
            kernel.cropped,
        )
        rows.setdefault(key, []).append(kernel)
    archs = "/".join(f"sm_{kernel.arch}" for kernel in next(iter(rows.values())))
    yield (
        "| kernel | compute | images | output | pixels | channels | threads | shared "
        f"| registers {archs} | spilled | occupancy {archs} |"
    )
    yield "|---" * 11 + "|"
    for same in rows.values():
        kernel = same[0]
        threads, shared = kernel.launch()
        form = "crop" if kernel.cropped else "vector" if kernel.run > 1 else "scalar"
        cells = [
            kernel.name,
            *kernel.types,
            f"{kernel.pixels} {form}",
            {0: "any", 3: "3"}.get(kernel.channels, f"≤ {kernel.channels}"),
            str(threads),
            str(shared),
            " / ".join(str(k.registers) for k in same),
            " / ".join(str(k.spilled_bytes) for k in same),
            " / ".join(
                f"{MULTIPROCESSORS[k.arch].occupancy(threads, k.registers, shared):.0%}"
                for k in same
            ),
        ]
        yield "| " + " | ".join(cells) + " |"


def traffic_table() -> Iterator[str]:
    yield "| kernel | K×B×C×H×W | images | output | must move | at 3.35 TB/s (prediction) |"
    yield "|---" * 6 + "|"
    for k, b, c, h, w in PROBLEMS:
        for image, output in (("uint8", "float32"), ("uint8", "bfloat16"), ("float32", "float32")):
            images = b * c * h * w * DTYPE_BYTES[image]
            outputs = k * b * c * h * w * DTYPE_BYTES[output]
            logits = k * (1 + c) * h * w * DTYPE_BYTES["float32"]
            for kernel, factor in (("stamp_forward", 1), ("stamp_backward", 2)):
                total = images + outputs + factor * logits
                yield (
                    f"| {kernel} | {k}×{b}×{c}×{h}×{w} | {image} | {output} "
                    f"| {total / 1e6:.1f} MB | {total / H100_BYTES_PER_SECOND * 1e6:.1f} µs |"
                )


def update_docs(sections: dict[str, str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in docs/cuda.md."""
    page = ROOT / "docs" / "cuda.md"
    text = page.read_text(encoding="utf-8")
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            sys.exit(f"cuda_report: {page} has no section {begin}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{section}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="What the CUDA kernels need of a GPU.")
    parser.add_argument("--arch", action="append", choices=sorted(MULTIPROCESSORS))
    parser.add_argument("--update-docs", action="store_true", help="rewrite docs/cuda.md's tables")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", version)
    archs = arguments.arch or sorted(MULTIPROCESSORS)
    kernels = [kernel for arch in archs for kernel in compile_kernels(nvcc, arch)]
    weights = [kernel for arch in archs for kernel in compile_weight_kernels(nvcc, arch)]
    search = [kernel for arch in archs for kernel in compile_search_kernels(nvcc, arch)]
    if not kernels or not weights or not search:
        sys.exit("cuda_report: ptxas named no kernel")
    spilling = [kernel for kernel in [*kernels, *weights, *search] if kernel.spilled_bytes > 0]
    names = ", ".join(f"sm_{arch}" for arch in archs)
    sections = {
        "summary": f"nvcc {release[1] if release else '?'}, `{' '.join(FLAGS)}`, {names}: "
        f"{(len(kernels) + len(weights) + len(search)) // len(archs)} kernels each, "
        f"{len(spilling)} in all spill registers.",
        "traffic": "\n".join(traffic_table()),
        "search traffic": "\n".join(search_traffic_table()),
        "search kernels": "\n".join(search_kernel_table(search)),
        "weights traffic": "\n".join(weight_traffic_table()),
        "weights kernels": "\n".join(weight_kernel_table(weights)),
        "kernels": "\n".join(kernel_table(kernels)),
    }
    print("\n\n".join(sections.values()))
    if arguments.update_docs:
        update_docs(sections)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
