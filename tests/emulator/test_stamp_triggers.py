"""Every CUDA kernel of stamp_triggers, run from its .cuh by the emulator.

The truth is the plain-PyTorch reference in float64. The CPU operator is a second witness: the two
share the order of their sums, so that they agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pydetox import _emulator, ops
from pydetox.ops import reference

Schedule = _emulator.Schedule
Reserve = Callable[[tuple[int, ...], torch.dtype], Tensor]
FLOATS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
]
IMAGES = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]
# K, B, C, H, W, patch size (0: NCHW)
SIZES = [
    (1, 1, 1, 1, 1, 0),
    (2, 3, 3, 5, 7, 0),  # no vectors fit
    (5, 17, 3, 8, 16, 0),  # more than one tile of triggers, of images and of chunks
    (3, 2, 3, 28, 28, 14),  # patches that vectors do not fit
    (2, 2, 3, 32, 16, 16),
    (3, 1, 3, 9, 6, 3),
    (2, 9, 16, 4, 8, 4),  # as many channels as allowed
    (1, 2, 1, 40, 72, 8),  # more than one tile of pixels
]


@dataclass(frozen=True)
class Case:
    """Inputs of one call, and its upstream gradient [K, B, ...] in the output's type."""

    images: Tensor
    mask_logits: Tensor
    pattern_logits: Tensor
    gradient: Tensor
    mean: list[float]
    std: list[float]
    patch_size: int


def make_case(
    sizes: tuple[int, ...],
    image_dtype: torch.dtype = torch.uint8,
    compute: torch.dtype = torch.float32,
    output: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    k, b, c, h, w, patch_size = sizes
    generator = torch.Generator().manual_seed(seed)
    if image_dtype == torch.uint8:
        images = torch.randint(0, 256, (b, c, h, w), generator=generator, dtype=torch.uint8)
    else:
        # A little outside of [0, 1], so that the clip is met on both sides.
        images = (torch.rand((b, c, h, w), generator=generator) * 1.5 - 0.25).to(image_dtype)
    mask = torch.randn((k, h, w), generator=generator, dtype=torch.float64) * 2
    pattern = torch.randn((k, c, h, w), generator=generator, dtype=torch.float64) * 2
    patches = (h // patch_size) * (w // patch_size) if patch_size else 0
    shape = (k, b, patches, c * patch_size**2) if patch_size else (k, b, c, h, w)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(output)
    mean = torch.linspace(0.4, 0.5, c).tolist()
    std = torch.linspace(0.2, 0.3, c).tolist()
    return Case(images, mask.to(compute), pattern.to(compute), gradient, mean, std, patch_size)


def unwritten(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


def emulate_forward(case: Case, schedule: Schedule) -> tuple[Tensor, _emulator.Traffic]:
    output = unwritten(case.gradient)
    inputs = (case.images, case.mask_logits, case.pattern_logits)
    options = (case.mean, case.std, case.patch_size or None)
    _, traffic = _emulator.run("stamp_triggers_out", *inputs, *options, output, schedule=schedule)
    return output, only(traffic)


def only(traffic: list[_emulator.Traffic]) -> _emulator.Traffic:
    """The one launch, or one that moves nothing."""
    assert len(traffic) <= 1
    return traffic[0] if traffic else _emulator.Traffic()


def emulate_backward(case: Case, schedule: Schedule) -> tuple[Tensor, Tensor, _emulator.Traffic]:
    mask_gradient, pattern_gradient = unwritten(case.mask_logits), unwritten(case.pattern_logits)
    inputs = (case.gradient, case.images, case.mask_logits, case.pattern_logits)
    options = (case.mean, case.std, case.patch_size or None)
    results = (mask_gradient, pattern_gradient)
    _, traffic = _emulator.run(
        "stamp_triggers_backward_out", *inputs, *options, *results, schedule=schedule
    )
    return *results, only(traffic)


def differentiate(case: Case, stamp: object, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the logits' gradients of `stamp`, computed in `dtype`."""
    mask = case.mask_logits.clone().to(dtype).requires_grad_()
    pattern = case.pattern_logits.clone().to(dtype).requires_grad_()
    images = case.images if case.images.dtype == torch.uint8 else case.images.to(dtype)
    output = stamp(  # type: ignore[operator]
        images,
        mask,
        pattern,
        mean=case.mean,
        std=case.std,
        patch_size=case.patch_size or None,
        dtype=torch.float64 if dtype == torch.float64 else case.gradient.dtype,
    )
    gradients = torch.autograd.grad(output, (mask, pattern), case.gradient.to(output.dtype))
    return output.detach(), *gradients


def assert_close(found: Tensor, truth: Tensor, plain: Tensor) -> None:
    """At most twice the error that plain PyTorch makes in the same type, and a last place."""
    epsilon = torch.finfo(found.dtype).eps
    allowed = 2 * (plain.double() - truth).abs().max() + 4 * epsilon * (1 + truth.abs().max())
    assert (found.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("image_dtype", IMAGES, ids=str)
@pytest.mark.parametrize(("compute", "output"), FLOATS, ids=str)
def test_kernels_against_float64(
    sizes: tuple[int, ...], image_dtype: torch.dtype, compute: torch.dtype, output: torch.dtype
) -> None:
    case = make_case(sizes, image_dtype, compute, output)
    truth = differentiate(case, reference.stamp_triggers, torch.float64)
    plain = differentiate(case, reference.stamp_triggers, compute)
    found, _ = emulate_forward(case, Schedule(seed=1))
    mask_gradient, pattern_gradient, _ = emulate_backward(case, Schedule(seed=2))
    for values in zip((found, mask_gradient, pattern_gradient), truth, plain, strict=True):
        assert_close(*values)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("compute", "output"), FLOATS, ids=str)
def test_same_bits_as_the_cpu_operator(
    sizes: tuple[int, ...], compute: torch.dtype, output: torch.dtype
) -> None:
    case = make_case(sizes, torch.uint8, compute, output)
    expected = differentiate(case, ops.stamp_triggers, compute)
    found, _ = emulate_forward(case, Schedule(seed=3))
    mask_gradient, pattern_gradient, _ = emulate_backward(case, Schedule(seed=4))
    assert torch.equal(found, expected[0])
    assert torch.equal(mask_gradient, expected[1])
    assert torch.equal(pattern_gradient, expected[2])


@pytest.mark.parametrize(("compute", "output"), FLOATS, ids=str)
def test_all_256_pixel_values_are_divided_exactly(
    compute: torch.dtype, output: torch.dtype
) -> None:
    case = make_case((1, 1, 1, 16, 16, 0), torch.uint8, compute, output)
    case = replace(case, images=torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    expected = differentiate(case, ops.stamp_triggers, compute)[0]
    assert torch.equal(emulate_forward(case, Schedule())[0], expected)


# Nine chunks of images, so that the block's eight warps take two rounds.
MANY_IMAGES = (2, 70, 3, 4, 8, 4)


@pytest.mark.parametrize("sizes", [MANY_IMAGES, (2, 9, 16, 4, 8, 4)], ids=str)
def test_schedules_do_not_change_a_bit(sizes: tuple[int, ...]) -> None:
    case = make_case(sizes)
    output, _ = emulate_forward(case, Schedule())
    mask_gradient, pattern_gradient, _ = emulate_backward(case, Schedule())
    for seed in range(1, 25):
        assert torch.equal(emulate_forward(case, Schedule(seed=seed))[0], output)
        found = emulate_backward(case, Schedule(seed=seed))
        assert torch.equal(found[0], mask_gradient)
        assert torch.equal(found[1], pattern_gradient)


def test_no_barrier_can_be_spared() -> None:
    """The mutants: the kernel without one of its barriers, and without any, comes out wrong."""
    case = make_case(MANY_IMAGES)
    mask_gradient, pattern_gradient, traffic = emulate_backward(case, Schedule())
    assert len(traffic.barriers) == 3
    for barrier in [*traffic.barriers, _emulator.DROP_ALL_BARRIERS]:
        wrong = 0
        for seed in range(1, 13):
            found = emulate_backward(case, Schedule(seed=seed, dropped_barrier=barrier))
            wrong += not (
                torch.equal(found[0], mask_gradient) and torch.equal(found[1], pattern_gradient)
            )
        assert wrong > 0, f"the barrier at line {barrier} is never missed"


def test_misaligned_tensors_give_the_same_bits() -> None:
    case = make_case((3, 9, 3, 8, 16, 0))

    def shifted(tensor: Tensor) -> Tensor:
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        buffer[1:] = tensor.flatten()
        return buffer[1:].view(tensor.shape)

    fields = ("images", "mask_logits", "pattern_logits", "gradient")
    output, aligned = emulate_forward(case, Schedule(seed=1))
    mask_gradient, pattern_gradient, _ = emulate_backward(case, Schedule(seed=1))
    assert aligned.bytes_stored == 16 * aligned.stores
    for field in fields:
        other = replace(case, **{field: shifted(getattr(case, field))})
        assert torch.equal(emulate_forward(other, Schedule(seed=2))[0], output)
        found = emulate_backward(other, Schedule(seed=2))
        assert torch.equal(found[0], mask_gradient)
        assert torch.equal(found[1], pattern_gradient)


@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 3, 4, 4, 0), (2, 0, 3, 4, 4, 0), (2, 2, 0, 4, 4, 0), (2, 2, 3, 0, 4, 0)],
    ids=str,
)
def test_empty(sizes: tuple[int, ...]) -> None:
    case = make_case(sizes)
    output, traffic = emulate_forward(case, Schedule(seed=1))
    assert output.numel() == 0
    assert traffic.loads == traffic.stores == 0
    mask_gradient, pattern_gradient, _ = emulate_backward(case, Schedule(seed=1))
    assert not mask_gradient.any()  # the sum over no images, or no channels, is zero
    assert not pattern_gradient.any()


def test_not_finite_values_go_through() -> None:
    case = make_case((2, 3, 3, 4, 8, 0), torch.float32)
    case.images[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    case.mask_logits[0, 1, :4] = torch.tensor([float("nan"), 1e4, -1e4, float("inf")])
    case.pattern_logits[1, 2, 2, :4] = torch.tensor([float("nan"), 1e4, -1e4, -float("inf")])
    expected = differentiate(case, reference.stamp_triggers, torch.float64)
    output, _ = emulate_forward(case, Schedule(seed=1))
    mask_gradient, pattern_gradient, _ = emulate_backward(case, Schedule(seed=1))
    for found, truth in zip((output, mask_gradient, pattern_gradient), expected, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert output.isnan().any()


# The model of the cache is small against the tensors, but holds what neighbouring blocks share. An
# H100 has 50 MiB for all its blocks.
CACHE_BYTES = 512 * 1024
STREAMING = (8, 16, 3, 128, 128)


@pytest.mark.parametrize("patch_size", [0, 16])
def test_forward_moves_what_it_must(patch_size: int) -> None:
    """DRAM traffic at most 1.05 times the minimum: every tensor once.

    Reads are counted as 32-byte sectors that miss an LRU cache, blocks in launch order; writes as
    stored bytes. What the threads request of the cache is a little more: each group of four
    triggers asks for the images, each channel for the mask.
    """
    case = make_case((*STREAMING, patch_size))
    output, traffic = emulate_forward(case, Schedule(cache_bytes=CACHE_BYTES))
    logits = case.mask_logits.nbytes + case.pattern_logits.nbytes
    minimum = case.images.nbytes + logits + output.nbytes
    assert case.images.nbytes > CACHE_BYTES
    assert traffic.bytes_stored == output.nbytes
    assert traffic.dram_bytes_read + traffic.bytes_stored <= 1.05 * minimum
    assert traffic.bytes_loaded == (
        2 * case.images.nbytes + 3 * case.mask_logits.nbytes + case.pattern_logits.nbytes
    )


@pytest.mark.parametrize("patch_size", [0, 16])
def test_backward_moves_what_it_must(patch_size: int) -> None:
    """As above. The upstream gradient and the logits are requested exactly once."""
    case = make_case((*STREAMING, patch_size))
    mask_gradient, pattern_gradient, traffic = emulate_backward(
        case, Schedule(cache_bytes=CACHE_BYTES)
    )
    logits = mask_gradient.nbytes + pattern_gradient.nbytes
    minimum = case.gradient.nbytes + case.images.nbytes + 2 * logits
    assert traffic.bytes_stored == logits
    assert traffic.dram_bytes_read + traffic.bytes_stored <= 1.05 * minimum
    assert traffic.bytes_loaded == case.gradient.nbytes + 8 * case.images.nbytes + logits


def test_more_than_2_to_the_31_elements(reserve: Reserve) -> None:
    """The last block of a launch whose tensors are too large for 32-bit indices."""
    k, b, c, side = 2, 12_000, 3, 256
    few = make_case((k, 8, c, side, side, 0), torch.uint8, torch.float32, torch.bfloat16)
    forward_pixels, backward_pixels = 512, 128  # of a block

    images = reserve((b, c, side, side), torch.uint8)
    output = reserve((k, b, c, side, side), torch.bfloat16)
    assert images.numel() > 2**31
    images[-8:] = few.images
    huge = replace(few, images=images, gradient=output)
    last_block = Schedule(only_block=-1)
    options = (few.mean, few.std, None)
    inputs = (images, few.mask_logits, few.pattern_logits)
    _emulator.run("stamp_triggers_out", *inputs, *options, output, schedule=last_block)
    expected = emulate_forward(few, Schedule())[0].reshape(k, 8, c, -1)
    found = output[:, -8:].reshape(k, 8, c, -1)
    assert torch.equal(found[:, :, -1, -forward_pixels:], expected[:, :, -1, -forward_pixels:])
    assert not found[:, :, :-1].any()

    # Seen from the gradient of the last eight images, the 11,992 others add nothing.
    output[:, -16:-8] = 0
    output[:, -8:] = few.gradient
    *results, _ = emulate_backward(huge, last_block)
    expected_gradients = emulate_backward(few, Schedule())
    for values, truth in zip(results, expected_gradients, strict=False):
        found_gradient = values[-1].flatten(-2)[..., -backward_pixels:]
        assert torch.equal(found_gradient, truth[-1].flatten(-2)[..., -backward_pixels:])


def test_launch_shapes(stamp_launch_shape: Callable[..., tuple[int, int, int]]) -> None:
    """Blocks, threads and shared bytes for aligned float32 tensors [K, B, C, H, W, P]."""
    shape = stamp_launch_shape
    assert shape(False, [8, 16, 3, 224, 224, 0]) == (2 * 3 * 196, 64, 0)
    assert shape(True, [8, 16, 3, 224, 224, 0])[:2] == (8 * 392, 64)
    assert shape(False, [1, 1, 1, 1, 1, 0])[0] == 1
    for empty in ([0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]):
        assert shape(False, empty)[0] == shape(True, empty)[0] == 0
    # Without channels there is no output; the gradient of the mask is zero and has to be written.
    assert shape(False, [1, 1, 0, 1, 1, 0])[0] == 0
    assert shape(True, [1, 1, 0, 1, 1, 0])[0] == 1
    # No 32-bit arithmetic: the launcher refuses more than 2^31 - 1 blocks by this number.
    assert shape(True, [2**33, 1, 1, 1, 1, 0])[0] == 2**33
    for channels in (1, 3, 16):
        for images in (0, 1, 9, 1000):
            for patch in (0, 1, 8):
                _, threads, shared = shape(True, [1, images, channels, 8, 8, patch])
                assert threads <= 256
                assert shared <= 48 * 1024  # more would need an opt-in
