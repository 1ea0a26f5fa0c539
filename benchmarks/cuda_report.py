"""What the CUDA kernels need of a GPU, found without one.

Compiles the CUDA sources for each architecture and prints, per kernel: registers, spilled bytes,
shared memory and threads of a block, theoretical occupancy, and for the kernels over weights the
bytes that a thread has under way at a time, counted in the machine code; then the bytes that each
launch must move and how long that takes by a model, which is no measurement. Needs nvcc, nvdisasm
and a build with the emulator, which knows the launch shapes. Exits with 1 if a kernel spills
registers, or one over weights asks for less than 64 bytes at a time.

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

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.sass import Loads, disassemble, find_nvdisasm, loads_in_flight
from pydetox import _emulator

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # those of CMakeLists.txt that change code
H100_BYTES_PER_SECOND = 3.35e12  # SXM5, NVIDIA's data sheet
DTYPES = {
    "unsigned char": "uint8",
    "pydetox::BFloat16": "bfloat16",
    "pydetox::Float16": "float16",
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
# The kernel (its template's arguments after the dtype) that each of these problems is mostly for.
WEIGHT_KERNELS = {
    "gram": ("gram_chunks", "8, true"),
    "project": ("project_chunks", "16"),
    "sketch": ("sketch_chunks", ""),
    "matmul": ("matmul_tiles", "right, words"),
    "apply": ("apply_chunks", "1"),
}
# What a thread of these kernels must have under way at a time: 4 x 16 bytes.
LEAST_BYTES = 64
# H100 SXM5: multiprocessors (data sheet); the latency is an assumption, of a memory under load.
H100_MULTIPROCESSORS = 132
LATENCY_SECONDS = 800e-9
# K, B, D, C of the objectives and K, C, H, W of the update, as the benchmarks have them.
OBJECTIVE_SIZES = [10, 16, 512, 1000]
MANY_DIMENSIONS = [10, 16, 2048, 1000]  # take one row at a time
UPDATE_SIZES = [8, 3, 224, 224]
# R, V, D of the token kernels, and k of the swaps.
TOKEN_SIZES = [64, 30_522, 768]
SWAPS = 256
TOKEN_KERNELS = {
    "largest_of_parts",
    "mix_parts",
    "mix_rows",
    "token_states",
    "token_gradients",
    "swap_offsets",
    "swap_slices_of_rows",
    "merge_swaps",
}
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
        # Patches of one pixel leave no run for vectors, those of two leave pairs.
        patch = 1 if self.run == 1 else 2 if self.run < self.pixels else 0
        sizes = [1, 16, channels, 64, 64, patch]
        box = [32, 32] if self.cropped else []
        return stamp_launch(self.name == "stamp_backward", sizes, self.types, box)


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    for candidate in (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"):
        path = candidate and shutil.which(candidate)
        if path:
            return path
    sys.exit("cuda_report: no nvcc in CUDACXX, in CUDA_HOME or on PATH")


@dataclass(frozen=True)
class Compiled:
    """One kernel of a source: its name, its template's arguments, and what the compiler says."""

    name: str
    arguments: list[str]
    registers: int
    spilled_bytes: int
    code: list[str]  # machine code


def compile_source(nvcc: str, nvdisasm: str, arch: str, source: Path) -> list[Compiled]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [nvcc, *FLAGS, f"-I{ROOT}", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        result = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        if result.returncode != 0:
            sys.exit(f"cuda_report: nvcc failed on {source.name}:\n{result.stderr}")
        code = disassemble(nvdisasm, cubin)
    pattern = re.compile(
        r"Function properties for (\S+).*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    found = pattern.findall(result.stdout + result.stderr)
    names = subprocess.run(
        ["c++filt"], input="\n".join(f[0] for f in found), capture_output=True, text=True
    ).stdout.splitlines()
    kernels = []
    for (mangled, stores, loads, registers), name in zip(found, names, strict=True):
        parts = re.match(r"(?:void )?pydetox::cuda::(\w+)(?:<(.*)>)?\(", name)
        if parts:
            arguments = _split(parts[2] or "")
            spilled = int(stores) + int(loads)
            kernels.append(
                Compiled(parts[1], arguments, int(registers), spilled, code.get(mangled, []))
            )
    return kernels


def _split(arguments: str) -> list[str]:
    """Arguments of a template, at the commas outside of other templates' arguments."""
    parts, depth = [""], 0
    for character in arguments:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / "csrc" / folder).glob("cuda*.cu"))


def stamp_launch(
    backward: bool, sizes: list[int], types: tuple[str, str, str], box: list[int]
) -> tuple[int, int]:
    """Threads and shared bytes of a launch. sizes: K, B, C, H, W, patch size."""
    k, b, c, h, w, patch = sizes
    compute, image, output = (getattr(torch, name) for name in types)
    rows, columns = box or (h, w)
    images = torch.zeros(b, c, h, w, dtype=image)
    mask, pattern = (torch.zeros(k, *s, rows, columns, dtype=compute) for s in ((), (c,)))
    shape = (k, b, (h // patch) * (w // patch), c * patch**2) if patch else (k, b, c, h, w)
    out = torch.zeros(shape, dtype=output)
    corners = torch.zeros(k, 2, dtype=torch.int64) if box else None
    tensors, options = (images, mask, pattern), ([0.0] * c, [1.0] * c, patch or None)
    if backward:
        results = (torch.empty_like(mask), torch.empty_like(pattern), corners)
        return dry_run("stamp_triggers_backward_out", out, *tensors, *options, *results)[0]
    return dry_run("stamp_triggers_out", *tensors, *options, out, corners, bool(box))[0]


def dry_run(operator: str, *arguments: object) -> list[tuple[int, int]]:
    """Threads and shared bytes of the launches of an operator."""
    _, launches = _emulator.run(operator, *arguments, schedule=_emulator.Schedule(dry=True))
    return [(launch.threads, launch.shared_bytes) for launch in launches]


def compile_kernels(nvcc: str, nvdisasm: str, arch: str) -> Iterator[Kernel]:
    """The kernels of stamping, from what ptxas says about each."""
    found = [
        kernel
        for source in sources("stamp_triggers")
        for kernel in compile_source(nvcc, nvdisasm, arch, source)
    ]
    # Forward first, and types in the order in which the page has always had them.
    order = list(DTYPES)
    found.sort(
        key=lambda k: (
            k.name != "stamp_forward",
            [-order.index(k.arguments[0]), -order.index(k.arguments[2])],
            order.index(k.arguments[1]),
        )
    )
    for kernel in found:
        compute, image, output, *numbers, places = kernel.arguments
        pixels, run, *channels = [int(n) for n in numbers]
        yield Kernel(
            arch,
            kernel.name,
            (DTYPES[compute], DTYPES[image], DTYPES[output]),
            pixels,
            run,
            channels[0] if channels else 0,
            places.endswith("CropPlaces"),
            kernel.registers,
            kernel.spilled_bytes,
        )


@dataclass(frozen=True)
class WeightKernel:
    """One compiled kernel over lists of weights. form: its template's other arguments.

    loads: what a thread has under way at a time, by anything or in words of 16 bytes.
    """

    arch: str
    name: str
    dtype: str
    form: str
    registers: int
    spilled_bytes: int
    loads: Loads
    words: Loads

    def launch(self) -> tuple[int, int]:
        """Threads and shared bytes of a block."""
        some = [torch.zeros(4096)]
        tile = int(self.form.split(",")[0]) if self.name.startswith(("gram", "project")) else 0
        many = some * max(tile, 1)
        if self.name == "gram_chunks":
            two_tiles = many if "true" in self.form else many * 2
            launches = dry_run("weight_diff_gram", some, two_tiles, len(two_tiles))
            return launches[0 if "true" in self.form else 1]
        if self.name == "project_chunks":
            return dry_run("weight_diff_project", some, some, many, tile)[0]
        if self.name == "sketch_chunks":
            return dry_run("weight_diff_sketch", some, some, [0], 4096)[0]
        if self.name == "matmul_tiles":
            factor = torch.zeros(1, 8, dtype=torch.float64)
            return dry_run("weight_diff_matmul", some, some, [factor], False)[0]
        return 256, 0  # apply, and the small ones after the sums

    def fails(self) -> bool:
        """Whether it asks for less than LEAST_BYTES at a time, which nobody waits for it to do.

        A mixture of dtypes, and matrices whose rows are not aligned, are read as they come.
        """
        if self.name not in {name for name, _ in WEIGHT_KERNELS.values()} | {"apply_many"}:
            return False
        if self.dtype == "mixed" or "singles" in self.form:
            return False
        # A sketch's elements are rotated: no words. Half of what a product asks for is its factor.
        by_words = self.name not in ("sketch_chunks", "matmul_tiles")
        return (self.words if by_words else self.loads).bytes < LEAST_BYTES


def compile_weight_kernels(nvcc: str, nvdisasm: str, arch: str) -> Iterator[WeightKernel]:
    files = [*sources("weights"), *sources("weight_matmul")]
    seen = set()
    for kernel in (k for f in files for k in compile_source(nvcc, nvdisasm, arch, f)):
        dtype, form = "", ", ".join(kernel.arguments)
        if kernel.name == "matmul_tiles":
            side, types, shape = kernel.arguments
            inner = re.search(r"SameType<(.*)>", types)
            dtype = DTYPES[inner[1]] if inner else "mixed"
            form = ("left" if side == "true" else "right") + ", "
            form += "words" if "Words" in shape else "singles"
        elif kernel.name not in ("sum_chunks", "unpack_gram"):
            dtype = DTYPES.get(kernel.arguments[0], "mixed")
            form = ", ".join(kernel.arguments[1:])
        if (kernel.name, dtype, form) in seen:  # one that several sources have
            continue
        seen.add((kernel.name, dtype, form))
        yield WeightKernel(
            arch,
            kernel.name,
            dtype,
            form,
            kernel.registers,
            kernel.spilled_bytes,
            loads_in_flight(kernel.code),
            loads_in_flight(kernel.code, only_words=True),
        )


def weight_kernel_table(kernels: list[WeightKernel]) -> Iterator[str]:
    rows: dict[tuple[str, str, str], list[WeightKernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.name, kernel.form, kernel.dtype), []).append(kernel)
    archs = "/".join(f"sm_{kernel.arch}" for kernel in next(iter(rows.values())))
    yield (
        f"| kernel | dtype | threads | shared | registers {archs} | spilled | occupancy {archs} "
        f"| bytes under way {archs} |"
    )
    yield "|---" * 8 + "|"
    for (name, form, dtype), same in sorted(rows.items()):
        threads, shared = same[0].launch()
        occupancy = " / ".join(f"{occupancy_of(k, threads, shared):.0%}" for k in same)
        cells = [
            f"{name}<{form}>" if form else name,
            dtype,
            str(threads),
            str(shared),
            " / ".join(str(k.registers) for k in same),
            " / ".join(str(k.spilled_bytes) for k in same),
            occupancy,
            " / ".join(f"{k.loads.count} loads, {k.loads.bytes}" for k in same),
        ]
        yield "| " + " | ".join(cells) + " |"


def occupancy_of(kernel: WeightKernel, threads: int, shared: int) -> float:
    return MULTIPROCESSORS[kernel.arch].occupancy(threads, kernel.registers, shared)


def weight_traffic_table(kernels: list[WeightKernel]) -> Iterator[str]:
    """Bytes, and two bounds of the time: the memory's bandwidth, and what is asked of it."""
    yield (
        "| operation | float32 weights | must move | at 3.35 TB/s (model) | under way "
        "| at that (model) |"
    )
    yield "|---" * 6 + "|"
    by_name = {(k.name, k.form): k for k in kernels if k.arch == "90" and k.dtype == "float32"}
    for operation, what, _, reads, writes in WEIGHT_PROBLEMS:
        total = (reads + writes) * WEIGHTS * 4
        seconds = total / H100_BYTES_PER_SECOND
        kernel = by_name[WEIGHT_KERNELS[operation]]
        threads, shared = kernel.launch()
        resident = occupancy_of(kernel, threads, shared) * MULTIPROCESSORS["90"].warps * 32
        under_way = resident * kernel.loads.bytes
        # Little's law: what is under way, each for the latency, is what arrives.
        arriving = under_way * H100_MULTIPROCESSORS / LATENCY_SECONDS
        modelled = total / min(arriving, H100_BYTES_PER_SECOND)
        yield (
            f"| {operation}, {what} | {WEIGHTS / 1e6:.1f} M | {total / 1e9:.2f} GB "
            f"| {seconds * 1e3:.2f} ms | {kernel.loads.bytes} B a thread, "
            f"{under_way / 1024:.0f} KiB a multiprocessor | {modelled * 1e3:.2f} ms |"
        )


@dataclass(frozen=True)
class SearchKernel:
    """One compiled kernel of the objectives, the update or the searches for tokens."""

    arch: str
    name: str
    arguments: str  # of the template
    registers: int
    spilled_bytes: int

    def launch(self) -> tuple[int, int]:
        """Threads and shared bytes of a block."""
        if self.name in TOKEN_KERNELS:
            return self._launch_of_tokens()
        sizes = MANY_DIMENSIONS if self.arguments.endswith(", 1") else OBJECTIVE_SIZES
        k, b, d, c = sizes
        z, one = torch.zeros(k, b, d), torch.zeros(k)
        norms, sums, gradients = dry_run("embedding_collapse_backward", one, z)
        targets = torch.zeros(k, dtype=torch.int64)
        _, rows, mean = dry_run("zero_shot_loss", z, torch.zeros(c, d), targets, 1.0, True)
        (scale,) = dry_run("zero_shot_loss_backward", one, z, z)
        triggers, channels, height, width = UPDATE_SIZES
        shapes = ((triggers, height, width), (triggers, channels, height, width))
        state = [torch.zeros(shape) for _ in range(4) for shape in shapes]
        vector = torch.ones(triggers)
        rest = (vector.long(), vector.bool(), None, None, None, None, 0.5, 0.9, 1e-8)
        update = dry_run("trigger_update", *state, vector, vector.clone(), None, *rest)
        masks, plans, moves = update
        threads, shared = {
            "invert_norms": norms,
            "sum_unit_rows": sums,
            "collapse_gradients": gradients,
            "zero_shot_rows": rows,
            "mean_of_rows": mean,
            "scale_triggers": scale,
            "update_masks": masks,
            "update_plans": plans,
            "update_triggers": moves,
        }[self.name]
        if self.name == "zero_shot_rows" and "double" in self.arguments:
            shared *= 2  # all of it is of the type of z
        return threads, shared

    def _launch_of_tokens(self) -> tuple[int, int]:
        dtype = torch.float64 if "double" in self.arguments else torch.float32
        logits = torch.zeros(3, 600, dtype=dtype)  # what a block has does not depend on sizes
        table, gradient = torch.zeros(600, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype)
        one, softmax = torch.ones(3, dtype=dtype), torch.ones(3, 2, dtype=dtype)
        largest, parts, rows = dry_run("mix_tokens", logits, table, one, None)
        shared = (gradient, gradient, softmax, logits, table, one, None)
        states, gradients = dry_run("mix_tokens_backward", *shared)
        offsets, slices, merge = dry_run("top_swaps", gradient, table, one.long(), None, SWAPS)
        return {
            "largest_of_parts": largest,
            "mix_parts": parts,
            "mix_rows": rows,
            "token_states": states,
            "token_gradients": gradients,
            "swap_offsets": offsets,
            "swap_slices_of_rows": slices,
            "merge_swaps": merge,
        }[self.name]


def compile_search_kernels(nvcc: str, nvdisasm: str, arch: str) -> Iterator[SearchKernel]:
    for source in [*sources("objectives"), *sources("trigger_update"), *sources("mix_tokens")]:
        for kernel in compile_source(nvcc, nvdisasm, arch, source):
            yield SearchKernel(
                arch,
                kernel.name,
                ", ".join(kernel.arguments),
                kernel.registers,
                kernel.spilled_bytes,
            )


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
    rows, tokens, dim = TOKEN_SIZES
    table, token_logits = 4 * tokens * dim, 4 * rows * tokens
    of_tokens = f"{rows}×{tokens:,}×{dim}"
    for operation, sizes, total in (
        ("embedding_collapse and its gradient", f"{k}×{b}×{d}", 3 * z),
        ("zero_shot_loss with its gradient", f"{k}×{b}×{d}, {c:,} classes", 2 * z + head),
        (
            "trigger_update",
            f"{triggers}×{channels}×{height}×{width}",
            7 * (1 + channels) * pixels + pixels,  # and the masks once more, for their norms
        ),
        ("mix_tokens", of_tokens, table + 2 * token_logits),  # once more, for the largest ones
        ("its gradient", of_tokens, table + 2 * token_logits),
        ("mix_tokens_update", of_tokens, table + 6 * token_logits),
        ("top_swaps", of_tokens, table),
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
        whole = "vector" if kernel.run == kernel.pixels else "pairs"
        form = "crop" if kernel.cropped else whole if kernel.run > 1 else "scalar"
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
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", version)
    archs = arguments.arch or sorted(MULTIPROCESSORS)
    kernels = [kernel for arch in archs for kernel in compile_kernels(nvcc, nvdisasm, arch)]
    weights = [kernel for arch in archs for kernel in compile_weight_kernels(nvcc, nvdisasm, arch)]
    search = [kernel for arch in archs for kernel in compile_search_kernels(nvcc, nvdisasm, arch)]
    if not kernels or not weights or not search:
        sys.exit("cuda_report: ptxas named no kernel")
    every: list[Kernel | WeightKernel | SearchKernel] = [*kernels, *weights, *search]
    spilling = [kernel for kernel in every if kernel.spilled_bytes > 0]
    waiting = [kernel for kernel in weights if kernel.fails()]
    for kernel in waiting:
        print(
            f"cuda_report: sm_{kernel.arch} {kernel.name}<{kernel.dtype}, {kernel.form}>: "
            f"{kernel.words.bytes} bytes under way in words, {kernel.loads.bytes} in all; expected "
            f"at least {LEAST_BYTES}",
            file=sys.stderr,
        )
    names = ", ".join(f"sm_{arch}" for arch in archs)
    sections = {
        "summary": f"nvcc {release[1] if release else '?'}, `{' '.join(FLAGS)}`, {names}: "
        f"{len(every) // len(archs)} kernels for each "
        f"architecture. {len(spilling)} of them all spill registers. {len(waiting)} kernels over "
        f"weights request less than {LEAST_BYTES} bytes at a time.",
        "traffic": "\n".join(traffic_table()),
        "search traffic": "\n".join(search_traffic_table()),
        "search kernels": "\n".join(search_kernel_table(search)),
        "weights traffic": "\n".join(weight_traffic_table(weights) if "90" in archs else ()),
        "weights kernels": "\n".join(weight_kernel_table(weights)),
        "kernels": "\n".join(kernel_table(kernels)),
    }
    print("\n\n".join(sections.values()))
    if arguments.update_docs:
        update_docs(sections)
    return 1 if spilling or waiting else 0


if __name__ == "__main__":
    sys.exit(main())
