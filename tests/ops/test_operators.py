"""How stamp_triggers behaves as an operator: registrations, torch.compile, errors, the library."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pydetox._build_info import build_info
from pydetox.errors import NativeLibraryError, UsageError
from pydetox.ops import _library, reference, stamp_triggers

# All of them, by their schemas: a new one needs no line here.
OPERATORS = sorted(
    name.removeprefix("pydetox::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("pydetox::")
)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


def tensors(
    dtype: torch.dtype = torch.float32, images: torch.dtype = torch.uint8, size: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, size, size), generator=generator)
    pixels = pixels.to(images) if images == torch.uint8 else (pixels / 255).to(images)
    mask = torch.randn(2, size, size, dtype=dtype, generator=generator)
    pattern = torch.randn(2, 3, size, size, dtype=dtype, generator=generator)
    return pixels, mask, pattern


# ---- registrations ------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [0, 4])
@pytest.mark.parametrize(
    ("dtype", "images", "output"),
    [
        (torch.float32, torch.uint8, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_opcheck(
    dtype: torch.dtype, images: torch.dtype, output: torch.dtype, patch_size: int
) -> None:
    pixels, mask, pattern = tensors(dtype, images)
    leaves = (mask.requires_grad_(), pattern.requires_grad_())
    forward = torch.ops.pydetox.stamp_triggers.default
    torch.library.opcheck(forward, (pixels, *leaves, MEAN, STD, patch_size or None, output))
    gradient = torch.ones_like(forward(pixels, *leaves, MEAN, STD, patch_size or None, output))
    plain = (mask.detach(), pattern.detach())
    torch.library.opcheck(
        torch.ops.pydetox.stamp_triggers_backward.default,
        (gradient.detach(), pixels, *plain, MEAN, STD, patch_size or None),
    )
    torch.library.opcheck(
        torch.ops.pydetox.stamp_triggers_out.default,
        (pixels, *plain, MEAN, STD, patch_size or None, torch.empty_like(gradient)),
    )
    torch.library.opcheck(
        torch.ops.pydetox.stamp_triggers_backward_out.default,
        (
            gradient.detach(),
            pixels,
            *plain,
            MEAN,
            STD,
            patch_size or None,
            *map(torch.empty_like, plain),
        ),
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_are_registered(operator: str) -> None:
    def registered(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"pydetox::{operator}", key)

    assert registered("CPU")
    assert registered("Meta")  # what torch.compile needs
    built_for_cuda = bool(_library.native.compile_info()["cuda"])
    assert (_library.PACKAGE_DIR / "_C_cuda.so").is_file() or not built_for_cuda
    assert registered("CUDA") == (built_for_cuda and torch.version.cuda is not None)
    assert _library.cuda_library_loaded() == registered("CUDA")


def test_every_operator_is_in_these_tests() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pydetox::")}
    assert names == {f"pydetox::{operator}" for operator in OPERATORS}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("patch_size", "shape"), [(None, (2, 4, 3, 8, 8)), (4, (2, 4, 4, 48)), (1, (2, 4, 64, 3))]
)
def test_fake_tensors(device: str, patch_size: int | None, shape: tuple[int, ...]) -> None:
    with FakeTensorMode():
        images = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device=device)
        mask = torch.empty(2, 8, 8, device=device, requires_grad=True)
        pattern = torch.empty(2, 3, 8, 8, device=device, requires_grad=True)
        stamped = stamp_triggers(images, mask, pattern, patch_size=patch_size, dtype=torch.bfloat16)
        assert stamped.shape == shape
        assert stamped.dtype == torch.bfloat16
        assert stamped.device.type == device
        # Not through autograd, whose engine asks for a real GPU.
        backward = torch.ops.pydetox.stamp_triggers_backward.default
        gradients = backward(stamped.detach(), images, mask, pattern, MEAN, STD, patch_size or 0)
        for gradient, leaf in zip(gradients, (mask, pattern), strict=True):
            assert gradient.shape == leaf.shape
            assert gradient.device.type == device


# ---- autograd -----------------------------------------------------------------------------------


def test_only_what_requires_a_gradient_gets_one() -> None:
    images, mask, pattern = tensors()
    assert not stamp_triggers(images, mask, pattern).requires_grad
    stamp_triggers(images, mask, pattern.requires_grad_()).sum().backward()
    assert pattern.grad is not None
    assert mask.grad is None


def test_double_backward_is_refused_by_name() -> None:
    images, mask, pattern = tensors()
    (gradient,) = torch.autograd.grad(
        stamp_triggers(images, mask.requires_grad_(), pattern).sum(), mask, create_graph=True
    )
    with pytest.raises(UsageError, match="stamp_triggers cannot be differentiated twice"):
        gradient.sum().backward()


def test_images_that_require_a_gradient_are_refused() -> None:
    images, mask, pattern = tensors(images=torch.float32)
    with pytest.raises(UsageError, match="images get no gradient"):
        stamp_triggers(images.requires_grad_(), mask, pattern)
    with torch.no_grad():
        stamp_triggers(images, mask, pattern)


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("patch_size", [None, 4])
def test_compile_does_not_break_the_graph(backend: str, patch_size: int | None) -> None:
    def loss(stamp: Callable[..., Tensor], images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        stamped = stamp(images, mask * 2, pattern, mean=MEAN, std=STD, patch_size=patch_size)
        return (stamped.sin() ** 2).sum()

    images, mask, pattern = tensors()
    leaves = (mask.requires_grad_(), pattern.requires_grad_())
    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for size in (4, 3):  # another batch size compiles again, or generalises
        ours = compiled(stamp_triggers, images[:size], *leaves)
        theirs = loss(reference.stamp_triggers, images[:size], *leaves)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
        )


# ---- errors -------------------------------------------------------------------------------------


def wrong(**changes: object) -> tuple[tuple[object, ...], dict[str, object]]:
    images, mask, pattern = tensors()
    arguments: dict[str, object] = {"images": images, "mask": mask, "pattern": pattern} | changes
    positional = tuple(arguments.pop(name) for name in ("images", "mask", "pattern"))
    return positional, arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(3, 8, 8)},
            r"images must be .* or \[K, B, C, H, W\], found \[3, 8, 8\]",
        ),
        ({"mask": torch.zeros(8, 8)}, r"mask_logits .*\[K, 8, 8\].*\[4, 3, 8, 8\].*found \[8, 8\]"),
        ({"mask": torch.zeros(2, 8, 7)}, r"\[K, 8, 8\] for images \[4, 3, 8, 8\].*\[2, 8, 7\]"),
        ({"pattern": torch.zeros(3, 3, 8, 8)}, r"\[2, 3, 8, 8\].*found \[3, 3, 8, 8\]"),
        ({"pattern": torch.zeros(2, 1, 8, 8)}, r"\[2, 3, 8, 8\].*found \[2, 1, 8, 8\]"),
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.int64)}, "images must be uint8.*int64"),
        (
            {"mask": torch.zeros(2, 8, 8, dtype=torch.float16)},
            "both float64, found float16",
        ),
        ({"mask": torch.zeros(2, 8, 8, dtype=torch.float64)}, "found float64 and float32"),
        ({"dtype": torch.float16}, "dtype must be bfloat16, float32 or float64, found .*float16"),
        ({"patch_size": 3}, r"divide height and width of images \[4, 3, 8, 8\], found 3"),
        ({"patch_size": 0}, "patch_size must divide.*found 0"),
        ({"patch_size": -4}, "patch_size must divide.*found -4"),
        ({"mean": (0.5,)}, "mean must have one number for each of 3 channels, found 1"),
        ({"std": (1, 1, 1, 1)}, "std must have one number for each of 3 channels, found 4"),
        ({"std": (1, 0, 1)}, "std must not be 0"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    positional, options = wrong(**changes)
    with pytest.raises(UsageError, match=message):
        stamp_triggers(*positional, **options)


def test_too_many_channels() -> None:
    with pytest.raises(UsageError, match=r"at most 16 channels, found images \[1, 17, 2, 2\]"):
        stamp_triggers(torch.zeros(1, 17, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1, 17, 2, 2))


def raw(**changes: object) -> Callable[[], object]:
    """The operator itself, whose own checks must hold without those of the Python front."""
    images, mask, pattern = tensors()
    arguments: dict[str, object] = {
        "images": images,
        "mask_logits": mask,
        "pattern_logits": pattern,
        "mean": MEAN,
        "std": STD,
        "patch_size": None,
    } | changes
    if "gradient" in changes:
        return lambda: torch.ops.pydetox.stamp_triggers_backward(**arguments)
    arguments.setdefault("dtype", torch.float32)
    return lambda: torch.ops.pydetox.stamp_triggers(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(8, 8)}, r"\[B, C, H, W\] or \[K, B, C, H, W\], found \[8, 8\]"),
        ({"mask_logits": torch.zeros(2, 7, 8)}, r"\[4, 3, 8, 8\], found \[2, 7, 8\]"),
        ({"pattern_logits": torch.zeros(2, 3, 8)}, r"found \[2, 3, 8\]"),
        ({"mean": [0.0]}, "mean must have one number for each of 3 channels, found 1"),
        ({"patch_size": 3}, r"patch_size must divide .*\[4, 3, 8, 8\], found 3"),
        ({"patch_size": -1}, "patch_size must divide .*found -1"),
        ({"dtype": torch.float64}, "float32 or bfloat16 for float32 logits"),
        ({"dtype": torch.int32}, "out must be float64 for float64 logits.*found int32"),
        (
            {"pattern_logits": torch.zeros(2, 3, 8, 8, dtype=torch.float64)},
            "found float32 and float64",
        ),
        (
            {"gradient": torch.zeros(2, 4, 3, 8, 7)},
            r"gradient must be \[2, 4, 3, 8, 8\]",
        ),
        (
            {"gradient": torch.zeros(2, 4, 3, 8, 8), "patch_size": 4},
            r"must be \[2, 4, 4, 48\]",
        ),
        ({"gradient": torch.zeros(2, 4, 3, 8, 8).double()}, "gradient must be .*found float64"),
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raw(**changes)()


# ---- the native library -------------------------------------------------------------------------


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(NativeLibraryError, match=r"nothing\.so is missing: build it"):
        _library.load_operator_library(tmp_path / "nothing.so")


def test_broken_library(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(NativeLibraryError, match=r"broken\.so does not fit torch 2\."):
        _library.load_operator_library(broken)


def test_missing_module() -> None:
    with pytest.raises(NativeLibraryError, match=r"pydetox\._absent cannot be imported"):
        _library.load_native_module("pydetox._absent")


# What a process prints: the capability and a digest of all that one call computes.
PROGRAM = """
import hashlib, torch
from pydetox.ops import cpu_capability, stamp_triggers
generator = torch.Generator().manual_seed(0)
images = torch.rand(19, 3, 33, 47, generator=generator)
mask = torch.randn(3, 33, 47, generator=generator).requires_grad_()
pattern = torch.randn(3, 3, 33, 47, generator=generator).requires_grad_()
stamped = stamp_triggers(images, mask, pattern, mean=(.5, .4, .3), std=(.2, .3, .4))
results = [stamped.detach(), *torch.autograd.grad(stamped.square().sum(), (mask, pattern))]
digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in results)).hexdigest()
print(cpu_capability(), torch.get_num_threads(), digest)
"""


def in_a_process(**environment: str) -> subprocess.CompletedProcess[str]:
    root = str(_library.PACKAGE_DIR.parent)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": root} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_processes_agree_to_the_bit() -> None:
    digests = set()
    names = _library.native.supported_cpu_capabilities()
    for name, threads in [(names[0], "1"), (names[-1], "2")]:
        result = in_a_process(PYDETOX_CPU_CAPABILITY=name, OMP_NUM_THREADS=threads)
        assert result.returncode == 0, result.stderr
        used, count, digest = result.stdout.split()
        assert (used, count) == (name, threads)
        digests.add(digest)
    assert len(digests) == 1


def test_unusable_capabilities_are_refused() -> None:
    unknown = in_a_process(PYDETOX_CPU_CAPABILITY="avx1024")
    assert unknown.returncode != 0
    message = (
        "NativeLibraryError: PYDETOX_CPU_CAPABILITY='avx1024' is not a CPU capability; expected"
    )
    assert message in unknown.stderr
    if "avx512" not in _library.native.supported_cpu_capabilities():
        absent = in_a_process(PYDETOX_CPU_CAPABILITY="avx512")
        assert "PYDETOX_CPU_CAPABILITY='avx512': this CPU cannot run it" in absent.stderr


def test_the_wide_vectors_of_avx512_are_tested_on_this_machine() -> None:
    """The fixture `capability` must cover every width of vector that this CPU can run at all."""
    names = _library.native.supported_cpu_capabilities()
    assert "scalar" in names
    if "avx2" in names:
        assert "avx2-wide" in names, "built without PYDETOX_EMULATOR=ON, which the tests need"


def test_build_info_is_true_and_can_be_written() -> None:
    info = build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["parallel_backend"] == "OpenMP"
    assert info["cuda_loaded"] == _library.cuda_library_loaded()
    assert bool(info["cuda_architectures"]) == info["cuda_built"]
    assert len(info["gpus"]) == torch.cuda.device_count()


def test_build_info_says_why_the_library_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unloadable(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise NativeLibraryError("library is missing")

    monkeypatch.setitem(sys.modules, "pydetox.ops", Unloadable("pydetox.ops"))
    info = build_info()
    assert info["native_library"] == "not loaded: library is missing"
    assert info["cpu_capability"] is None
    assert info["torch"] == torch.__version__
