"""The CUDA kernels of stamp_triggers on boxes and on a batch for each trigger, run by the emulator.

As in test_stamp_triggers.py: the truth is plain PyTorch in float64, the CPU operator a second
witness that agrees bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pydetox import _emulator, ops
from pydetox.ops import reference
from tests.emulator.test_stamp_triggers import (
    FLOATS,
    IMAGES,
    Schedule,
    assert_close,
    unwritten,
)

# K, B, C, H, W, patch size (0: NCHW), h, w
SIZES = [
    (1, 1, 1, 1, 2, 0, 1, 1),
    (2, 3, 3, 5, 7, 0, 3, 4),
    (5, 17, 3, 8, 16, 0, 5, 9),  # more than one tile of images and of chunks
    (3, 2, 3, 28, 28, 14, 9, 27),  # over several patches
    (2, 2, 3, 32, 16, 16, 7, 5),
    (3, 1, 3, 9, 6, 3, 9, 1),
    (2, 9, 16, 4, 8, 4, 3, 3),  # as many channels as allowed
    (2, 2, 1, 24, 72, 8, 17, 61),  # more than one tile of pixels
]


@dataclass(frozen=True)
class Case:
    """Inputs of one call; `corners` None: no crop."""

    images: Tensor
    mask_logits: Tensor
    pattern_logits: Tensor
    gradient: Tensor
    corners: Tensor | None
    mean: list[float]
    std: list[float]
    patch_size: int

    def inputs(self) -> tuple[object, ...]:
        """Tensors and options, as the operators take them."""
        tensors = (self.images, self.mask_logits, self.pattern_logits)
        return (*tensors, self.mean, self.std, self.patch_size or None)

    def boxes(self) -> Tensor:
        """Whether an element of the output is in its trigger's box."""
        k, b = self.gradient.shape[:2]
        inside = torch.zeros(k, b, *self.images.shape[-3:], dtype=torch.bool)
        h, w = self.mask_logits.shape[1:]
        assert self.corners is not None
        for trigger, (top, left) in enumerate(self.corners.tolist()):
            inside[trigger, ..., top : top + h, left : left + w] = True
        return reference.to_patch_rows(inside, self.patch_size) if self.patch_size else inside


def make_case(
    sizes: tuple[int, ...],
    image_dtype: torch.dtype = torch.uint8,
    compute: torch.dtype = torch.float32,
    output: torch.dtype = torch.float32,
    *,
    own: bool = False,
    corners: list[tuple[int, int]] | None = None,
) -> Case:
    k, b, c, h, w, patch_size, *box = sizes
    generator = torch.Generator().manual_seed(0)
    shape = (k, b, c, h, w) if own else (b, c, h, w)
    if image_dtype == torch.uint8:
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:  # a little outside of [0, 1], so that the clip is met on both sides
        images = (torch.rand(shape, generator=generator) * 1.5 - 0.25).to(image_dtype)
    rows, columns = box or (h, w)
    places = None
    if box:
        tops = torch.randint(0, h - rows + 1, (k,), generator=generator)
        lefts = torch.randint(0, w - columns + 1, (k,), generator=generator)
        places = torch.stack([tops, lefts], dim=1)
        places = torch.tensor(corners) if corners else places
    mask = torch.randn((k, rows, columns), generator=generator, dtype=torch.float64) * 2
    pattern = torch.randn((k, c, rows, columns), generator=generator, dtype=torch.float64) * 2
    gradient = torch.randn((k, b, c, h, w), generator=generator, dtype=torch.float64)
    if patch_size:
        gradient = reference.to_patch_rows(gradient, patch_size)
    return Case(
        images,
        mask.to(compute),
        pattern.to(compute),
        gradient.to(output),
        places,
        torch.linspace(0.4, 0.5, c).tolist(),
        torch.linspace(0.2, 0.3, c).tolist(),
        patch_size,
    )


def emulate_forward(
    case: Case, schedule: Schedule, *, only_box: bool = False, into: Tensor | None = None
) -> tuple[Tensor, _emulator.Traffic]:
    output = unwritten(case.gradient) if into is None else into
    _, traffic = _emulator.run(
        "stamp_triggers_out", *case.inputs(), output, case.corners, only_box, schedule=schedule
    )
    return output, only(traffic)


def only(traffic: list[_emulator.Traffic]) -> _emulator.Traffic:
    """The one launch, or one that moves nothing."""
    assert len(traffic) <= 1
    return traffic[0] if traffic else _emulator.Traffic()


def emulate_backward(case: Case, schedule: Schedule) -> tuple[Tensor, Tensor, _emulator.Traffic]:
    results = unwritten(case.mask_logits), unwritten(case.pattern_logits)
    _, traffic = _emulator.run(
        "stamp_triggers_backward_out",
        case.gradient,
        *case.inputs(),
        *results,
        case.corners,
        schedule=schedule,
    )
    return *results, only(traffic)


def differentiate(case: Case, stamp: object, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the logits' gradients of `stamp`, computed in `dtype`."""
    leaves = [t.clone().to(dtype).requires_grad_() for t in (case.mask_logits, case.pattern_logits)]
    images = case.images if case.images.dtype == torch.uint8 else case.images.to(dtype)
    output = stamp(  # type: ignore[operator]
        images,
        *leaves,
        mean=case.mean,
        std=case.std,
        patch_size=case.patch_size or None,
        dtype=torch.float64 if dtype == torch.float64 else case.gradient.dtype,
        corners=case.corners,
    )
    return output.detach(), *torch.autograd.grad(output, leaves, case.gradient.to(output.dtype))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("compute", "output"), FLOATS, ids=str)
def test_kernels_against_float64_and_the_cpu_operator(
    sizes: tuple[int, ...], compute: torch.dtype, output: torch.dtype, own: bool
) -> None:
    case = make_case(sizes, torch.uint8, compute, output, own=own)
    truth = differentiate(case, reference.stamp_triggers, torch.float64)
    plain = differentiate(case, reference.stamp_triggers, compute)
    on_cpu = differentiate(case, ops.stamp_triggers, compute)
    stamped, _ = emulate_forward(case, Schedule(seed=1))
    *gradients, _ = emulate_backward(case, Schedule(seed=2))
    for found, *others, expected in zip((stamped, *gradients), truth, plain, on_cpu, strict=True):
        assert_close(found, *others)
        assert torch.equal(found, expected)

    # The box alone: the bits of the whole call inside, nothing written outside; and backward reads
    # the upstream gradient nowhere else.
    boxes = case.boxes()
    box, traffic = emulate_forward(case, Schedule(seed=3), only_box=True)
    assert torch.equal(box[boxes], stamped[boxes])
    assert box[~boxes].isnan().all()
    assert traffic.bytes_stored == int(boxes.sum()) * box.element_size()
    blind = replace(case, gradient=case.gradient.masked_fill(~boxes, torch.nan))
    *found, traffic = emulate_backward(blind, Schedule(seed=4))
    assert all(map(torch.equal, found, gradients))


@pytest.mark.parametrize("image_dtype", IMAGES, ids=str)
@pytest.mark.parametrize(("compute", "output"), FLOATS, ids=str)
@pytest.mark.parametrize("channels", [2, 3])
def test_every_instantiation(
    image_dtype: torch.dtype, compute: torch.dtype, output: torch.dtype, channels: int
) -> None:
    case = make_case((2, 3, channels, 8, 16, 4, 5, 9), image_dtype, compute, output)
    expected = differentiate(case, ops.stamp_triggers, compute)
    stamped, _ = emulate_forward(case, Schedule(seed=1))
    *gradients, _ = emulate_backward(case, Schedule(seed=2))
    if not (image_dtype == torch.float64 and compute == torch.float32):
        assert all(map(torch.equal, (stamped, *gradients), expected))
    truth = differentiate(case, reference.stamp_triggers, torch.float64)
    plain = differentiate(case, reference.stamp_triggers, compute)
    for values in zip((stamped, *gradients), truth, plain, strict=True):
        assert_close(*values)


@pytest.mark.parametrize(("compute", "output"), FLOATS, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(5, 17, 3, 8, 16, 0), (6, 2, 3, 32, 16, 16), (3, 2, 3, 5, 7, 0), (2, 9, 16, 4, 8, 4)],
    ids=str,
)
def test_own_images_without_a_crop(
    sizes: tuple[int, ...], compute: torch.dtype, output: torch.dtype
) -> None:
    case = make_case(sizes, torch.float32, compute, output, own=True)
    expected = differentiate(case, ops.stamp_triggers, compute)
    stamped, _ = emulate_forward(case, Schedule(seed=1))
    *gradients, _ = emulate_backward(case, Schedule(seed=2))
    assert all(map(torch.equal, (stamped, *gradients), expected))


def test_corners_that_would_stick_out_are_moved_to_the_border() -> None:
    outside = [(-1, 0), (0, -(2**63)), (2**63 - 1, 3), (3, 2**40)]
    inside = [(0, 0), (0, 0), (4, 3), (3, 11)]
    sizes = (4, 3, 3, 8, 16, 0, 4, 5)
    given, expected = make_case(sizes, corners=outside), make_case(sizes, corners=inside)
    for only_box in (False, True):
        found = emulate_forward(given, Schedule(seed=1), only_box=only_box)[0]
        like = emulate_forward(expected, Schedule(seed=1), only_box=only_box)[0]
        torch.testing.assert_close(found, like, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(
        emulate_backward(given, Schedule())[:2],
        emulate_backward(expected, Schedule())[:2],
        strict=True,
    ):
        assert torch.equal(a, b)


# Nine chunks of images, so that the block's eight warps take two rounds.
MANY_IMAGES = (2, 70, 3, 8, 16, 4, 7, 13)


def test_schedules_do_not_change_a_bit() -> None:
    for own in (False, True):
        case = make_case(MANY_IMAGES, own=own)
        output, _ = emulate_forward(case, Schedule())
        gradients = emulate_backward(case, Schedule())[:2]
        for seed in range(1, 13):
            assert torch.equal(emulate_forward(case, Schedule(seed=seed))[0], output)
            found = emulate_backward(case, Schedule(seed=seed))
            assert all(map(torch.equal, found[:2], gradients))


def test_no_barrier_can_be_spared() -> None:
    case = make_case(MANY_IMAGES)
    *gradients, traffic = emulate_backward(case, Schedule())
    assert len(traffic.barriers) == 3
    for barrier in [*traffic.barriers, _emulator.DROP_ALL_BARRIERS]:
        wrong = 0
        for seed in range(1, 13):
            found = emulate_backward(case, Schedule(seed=seed, dropped_barrier=barrier))
            wrong += not all(map(torch.equal, found[:2], gradients))
        assert wrong > 0, f"the barrier at line {barrier} is never missed"


@pytest.mark.parametrize("box", [(), (5, 9)], ids=str)
def test_misaligned_tensors_give_the_same_bits(box: tuple[int, ...]) -> None:
    case = make_case((3, 9, 3, 8, 16, 0, *box), own=True)

    def shifted(tensor: Tensor) -> Tensor:
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        buffer[1:] = tensor.flatten()
        return buffer[1:].view(tensor.shape)

    output, _ = emulate_forward(case, Schedule(seed=1))
    gradients = emulate_backward(case, Schedule(seed=1))[:2]
    fields = ["images", "mask_logits", "pattern_logits", "gradient", *(["corners"] if box else [])]
    for field in fields:
        other = replace(case, **{field: shifted(getattr(case, field))})
        assert torch.equal(emulate_forward(other, Schedule(seed=2))[0], output)
        assert all(map(torch.equal, emulate_backward(other, Schedule(seed=2))[:2], gradients))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 2, 3, 4, 4, 0, 2, 2),
        (2, 0, 3, 4, 4, 0, 2, 2),
        (2, 2, 0, 4, 4, 0, 2, 2),
        (2, 2, 3, 4, 4, 0, 0, 2),
        (2, 2, 3, 4, 4, 2, 2, 0),
    ],
    ids=str,
)
def test_empty(sizes: tuple[int, ...], own: bool) -> None:
    case = make_case(sizes, own=own)
    output, _ = emulate_forward(case, Schedule(seed=1))
    expected = differentiate(case, ops.stamp_triggers, torch.float32)
    assert torch.equal(output, expected[0])  # without a box: the clean images
    _, traffic = emulate_forward(case, Schedule(seed=1), only_box=True)
    assert traffic.stores == 0
    for found in emulate_backward(case, Schedule(seed=1))[:2]:
        assert not found.any()


# ---- bytes --------------------------------------------------------------------------------------

CACHE_BYTES = 512 * 1024
SECTOR = 32


def sectors(tensor: Tensor, elements: Tensor) -> int:
    """Bytes of the 32-byte sectors that hold the chosen elements of a tensor."""
    size = tensor.element_size()
    offsets = elements.flatten().nonzero().flatten() * size + tensor.data_ptr() % SECTOR
    return SECTOR * int(
        torch.cat([offsets // SECTOR, (offsets + size - 1) // SECTOR]).unique().numel()
    )


@pytest.mark.parametrize(
    ("corner", "width", "aligned"),
    [((33, 32), 64, True), ((33, 37), 64, False), ((5, 3), 27, False), ((17, 11), 111, False)],
)
@pytest.mark.parametrize("patch_size", [0, 16])
def test_a_box_moves_what_it_must(
    corner: tuple[int, int], width: int, aligned: bool, patch_size: int
) -> None:
    """Forward with only_box, and backward: at most 1.05 times the least that DRAM can deliver.

    DRAM reads whole 32-byte sectors, so the least is the sectors that the boxes touch, once: for a
    row of w pixels up to 32 - size bytes more at either end. Where rows begin and end on sectors,
    it is at most 1.05 times the bytes of the boxes themselves.
    """
    k = 8
    sizes = (k, 16, 3, 128, 128, patch_size, 64, width)
    case = make_case(sizes, corners=[corner] * k)
    boxes = case.boxes()
    pixels = torch.zeros_like(case.images, dtype=torch.bool)
    top, left = corner
    pixels[..., top : top + 64, left : left + width] = True
    logits = case.mask_logits.nbytes + case.pattern_logits.nbytes
    written = int(boxes.sum()) * case.gradient.element_size()
    images = sectors(case.images, pixels)

    _, traffic = emulate_forward(case, Schedule(cache_bytes=CACHE_BYTES), only_box=True)
    assert traffic.bytes_stored == written
    forward = traffic.dram_bytes_read + traffic.bytes_stored
    assert forward <= 1.05 * (images + logits + written)

    *_, traffic = emulate_backward(case, Schedule(cache_bytes=CACHE_BYTES))
    assert traffic.bytes_stored == logits
    backward = traffic.dram_bytes_read + traffic.bytes_stored
    assert backward <= 1.05 * (sectors(case.gradient, boxes) + images + 2 * logits)
    # Requested exactly once, but for the images (each trigger's own request) and the corner, which
    # all threads of a block ask for at once.
    corners = 16 * traffic.blocks * traffic.threads
    assert traffic.bytes_loaded == written + k * int(pixels.sum()) + logits + corners

    if aligned:
        assert forward <= 1.05 * (int(pixels.sum()) + logits + written)
        assert backward <= 1.05 * (int(pixels.sum()) + 2 * logits + written)


@pytest.mark.parametrize("patch_size", [0, 16])
def test_a_crop_of_the_whole_output_moves_what_it_must(patch_size: int) -> None:
    case = make_case((8, 16, 3, 128, 128, patch_size, 40, 40))
    output, traffic = emulate_forward(case, Schedule(cache_bytes=CACHE_BYTES))
    logits = case.mask_logits.nbytes + case.pattern_logits.nbytes
    assert traffic.bytes_stored == output.nbytes
    least = case.images.nbytes + logits + output.nbytes
    assert traffic.dram_bytes_read + traffic.bytes_stored <= 1.05 * least


@pytest.mark.parametrize("patch_size", [0, 16])
def test_own_images_are_read_once(patch_size: int) -> None:
    case = make_case((6, 16, 3, 96, 96, patch_size), own=True)
    output, traffic = emulate_forward(case, Schedule(cache_bytes=CACHE_BYTES))
    logits = case.mask_logits.nbytes + case.pattern_logits.nbytes
    least = case.images.nbytes + logits + output.nbytes
    assert traffic.dram_bytes_read + traffic.bytes_stored <= 1.05 * least
    *_, traffic = emulate_backward(case, Schedule(cache_bytes=CACHE_BYTES))
    least = case.images.nbytes + 2 * logits + case.gradient.nbytes
    assert traffic.dram_bytes_read + traffic.bytes_stored <= 1.05 * least


# ---- sizes --------------------------------------------------------------------------------------


def test_more_than_2_to_the_31_elements(
    reserve: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> None:
    """The last trigger's box of a launch whose tensors are too large for 32-bit indices."""
    k, b, c, side = 3, 4_000, 3, 256
    few = make_case((k, 8, c, side, side, 0, 4, 5), output=torch.bfloat16, own=True)
    assert few.corners is not None

    images = reserve((k, b, c, side, side), torch.uint8)
    output = reserve((k, b, c, side, side), torch.bfloat16)
    assert images.numel() > 2**31
    images[:, -8:] = few.images
    huge = replace(few, images=images, gradient=output)
    last = Schedule(only_block=-1)
    emulate_forward(huge, last, only_box=True, into=output)
    expected = emulate_forward(few, Schedule())[0]
    top, left = few.corners[-1].tolist()
    rows, columns = slice(top, top + 4), slice(left, left + 5)
    found = output[-1, -8:, -1, rows, columns]
    assert torch.equal(found, expected[-1, :, -1, rows, columns])
    assert not output[:-1, -8:].any()

    # Seen from the gradient of the last eight images, the others add nothing.
    output[-1] = 0
    output[-1, -8:] = few.gradient[-1]
    *results, _ = emulate_backward(huge, last)
    for found, truth in zip(results, emulate_backward(few, Schedule())[:2], strict=True):
        assert torch.equal(found[-1], truth[-1])


def test_launch_shapes(stamp_launch_shape: Callable[..., tuple[int, int, int]]) -> None:
    """The grid is the boxes': 64x64 of 224x224."""
    shape, sizes = stamp_launch_shape, [8, 16, 3, 224, 224, 0]
    assert shape(False, sizes, box=[64, 64]) == (8 * 3 * 32, 64, 0)
    assert shape(True, sizes, box=[64, 64])[:2] == (8 * 64, 64)
    for box in ([0, 5], [5, 0], [0, 0]):
        assert shape(False, sizes, box=box)[0] == shape(True, sizes, box=box)[0] == 0
    # No 32-bit arithmetic: the launcher refuses more than 2^31 - 1 blocks by this number.
    assert shape(True, [2**33, 1, 1, 1, 2, 0], box=[1, 1])[0] == 2**33
