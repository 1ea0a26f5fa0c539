"""stamp_triggers on boxes, and on a batch of images for each trigger.

Two truths: plain PyTorch in float64, and the whole operator, whose bits a box must have inside.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pydetox.errors import UsageError
from pydetox.ops import _library, reference, stamp_triggers, stamp_triggers_gradients

U8, BF16, F32, F64 = torch.uint8, torch.bfloat16, torch.float32, torch.float64
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@dataclass(frozen=True)
class Case:
    """One call; the defaults are a small ordinary one. `own`: images for each trigger."""

    triggers: int = 3
    batch: int = 5
    channels: int = 3
    height: int = 12
    width: int = 20
    box: tuple[int, int] | None = (5, 7)
    own: bool = False
    images: torch.dtype = U8
    logits: torch.dtype = F32
    dtype: torch.dtype | None = None
    patch_size: int | None = None

    def tensors(self) -> "Tensors":
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=F64, generator=generator)

        shape = (self.batch, self.channels, self.height, self.width)
        shape = (self.triggers, *shape) if self.own else shape
        if self.images == U8:
            images = torch.randint(0, 256, shape, dtype=U8, generator=generator)
        else:  # beyond [0, 1] too, so that clip has something to do
            images = (torch.rand(shape, dtype=F64, generator=generator) * 1.4 - 0.2).to(self.images)
        h, w = self.box or (self.height, self.width)
        mask = normal(self.triggers, h, w).to(self.logits)
        pattern = normal(self.triggers, self.channels, h, w).to(self.logits)
        corners = None
        if self.box is not None:
            corners = torch.stack(
                [
                    torch.randint(0, whole - part + 1, (self.triggers,), generator=generator)
                    for whole, part in ((self.height, h), (self.width, w))
                ],
                dim=1,
            )
        gradient = normal(self.triggers, self.batch, self.channels, self.height, self.width)
        if self.patch_size is not None:
            gradient = reference.to_patch_rows(gradient, self.patch_size)
        return Tensors(images, mask, pattern, gradient.to(self.dtype or self.logits), corners)

    def options(self) -> dict[str, Any]:
        return {
            "mean": MEAN[: self.channels],
            "std": STD[: self.channels],
            "patch_size": self.patch_size,
        }


@dataclass(frozen=True)
class Tensors:
    images: Tensor
    mask: Tensor
    pattern: Tensor
    gradient: Tensor
    corners: Tensor | None

    def places(self) -> list[tuple[slice, slice]]:
        """The boxes, as slices of rows and columns."""
        assert self.corners is not None
        height, width = self.mask.shape[1:]
        return [
            (slice(top, top + height), slice(left, left + width))
            for top, left in self.corners.tolist()
        ]


def run(case: Case, stamp: Callable[..., Tensor], t: Tensors) -> list[Tensor]:
    """The result and the gradients of both logits."""
    leaves = [logits.detach().requires_grad_() for logits in (t.mask, t.pattern)]
    output = stamp(t.images, *leaves, **case.options(), dtype=case.dtype, corners=t.corners)
    assert output.shape == t.gradient.shape
    return [output.detach(), *torch.autograd.grad(output, leaves, t.gradient.to(output.dtype))]


def to_images(rows: Tensor, case: Case) -> Tensor:
    """[K, B, C, H, W] of either layout."""
    size = case.patch_size
    if size is None:
        return rows
    grid = rows.unflatten(2, (case.height // size, case.width // size))
    grid = grid.unflatten(4, (case.channels, size, size))  # K, B, y, x, C, py, px
    return grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


CASES = [
    Case(),
    Case(own=True),
    Case(own=True, box=None),
    Case(own=True, box=None, patch_size=4, images=F32, dtype=BF16),
    Case(triggers=9, batch=7, channels=1, height=2, width=3, box=(1, 1)),
    Case(box=(1, 1), images=F32),
    Case(box=(12, 1), images=BF16),
    Case(box=(1, 20), logits=BF16),
    Case(triggers=70, batch=2, height=9, width=11, box=(2, 3), own=True),
    Case(batch=17, height=31, width=29, box=(19, 23), images=F32),
    Case(triggers=1, batch=300, height=8, width=8, box=(3, 5), images=F32),
    Case(batch=2, height=224, width=224, box=(65, 63)),  # more than one tile
    Case(batch=9, channels=2, images=F64, logits=F64, box=(7, 5)),
    Case(patch_size=4, box=(6, 9)),
    Case(patch_size=4, box=(6, 9), own=True, images=F32, dtype=BF16),
    Case(patch_size=2, box=(3, 5), images=F64, logits=F64),
    Case(patch_size=1, box=(5, 7), images=F32),
    Case(height=28, width=42, patch_size=14, box=(9, 30), images=F32),
    Case(height=28, width=28, patch_size=14, box=(27, 27), dtype=F64),
]


@pytest.mark.parametrize("case", [c for c in CASES if c.logits != F64], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(case: Case, capability: str) -> None:
    """Float64 has the bits of the whole operator, which has a truth in extended precision."""
    t = case.tensors()
    images = t.images if t.images.dtype == U8 else t.images.double()
    exact = run(
        replace(case, dtype=F64),
        reference.stamp_triggers,
        Tensors(images, t.mask.double(), t.pattern.double(), t.gradient.double(), t.corners),
    )
    ours, theirs = run(case, stamp_triggers, t), run(case, reference.stamp_triggers, t)
    for i, (our, their, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, theirs_error = ((x.double() - true).abs().max() for x in (our, their))
        # Where PyTorch is exact by luck, two roundings of the largest are allowed.
        rounding = torch.finfo(case.dtype if i == 0 and case.dtype else case.logits).eps
        assert error <= max(2 * theirs_error, rounding * true.abs().max())


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.box is not None and BF16 not in (c.logits, c.images)], ids=str
)
def test_inside_the_whole_operator_and_outside_the_clean_images(
    case: Case, capability: str
) -> None:
    t = case.tensors()
    output, mask_gradient, pattern_gradient = run(case, stamp_triggers, t)
    plane = (case.height, case.width)
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(case.triggers, *plane, generator=generator).to(t.mask)
    pattern = torch.randn(case.triggers, case.channels, *plane, generator=generator).to(t.mask)
    for k, (rows, columns) in enumerate(t.places()):
        mask[k, rows, columns] = t.mask[k]
        pattern[k, :, rows, columns] = t.pattern[k]
    whole = run(case, stamp_triggers, Tensors(t.images, mask, pattern, t.gradient, None))

    compute = F64 if F64 in (case.logits, case.dtype) else F32
    pixels = t.images.to(compute) / (255 if case.images == U8 else 1)
    mean, inverse_std = (
        torch.tensor(values[: case.channels], dtype=F64).view(-1, 1, 1)
        for values in (MEAN, [1 / s for s in STD])
    )
    clean = (pixels.clamp(0, 1) - mean.to(compute)) * inverse_std.to(compute)
    expected = clean.expand(case.triggers, case.batch, case.channels, *plane).to(output.dtype)
    expected = expected.clone()
    stamped = to_images(whole[0], case)
    for k, (rows, columns) in enumerate(t.places()):
        expected[k, ..., rows, columns] = stamped[k, ..., rows, columns]
        assert torch.equal(mask_gradient[k], whole[1][k, rows, columns])
        assert torch.equal(pattern_gradient[k], whole[2][k, :, rows, columns])
    assert torch.equal(to_images(output, case), expected)


@pytest.mark.parametrize("patch_size", [None, 4])
@pytest.mark.parametrize("own", [False, True])
def test_a_box_as_large_as_the_image_has_its_bits(
    own: bool, patch_size: int | None, capability: str
) -> None:
    case = Case(box=(12, 20), own=own, patch_size=patch_size)
    t = case.tensors()
    without = run(case, stamp_triggers, replace(t, corners=None))
    assert all(map(torch.equal, run(case, stamp_triggers, t), without))


@pytest.mark.parametrize("case", [c for c in CASES if c.own], ids=str)
def test_own_images_are_one_call_for_each_trigger(case: Case, capability: str) -> None:
    t = case.tensors()
    together = run(case, stamp_triggers, t)
    for k in range(case.triggers):
        one = slice(k, k + 1)
        corners = None if t.corners is None else t.corners[one]
        alone = Tensors(t.images[k], t.mask[one], t.pattern[one], t.gradient[one], corners)
        for whole, part in zip(together, run(case, stamp_triggers, alone), strict=True):
            assert torch.equal(whole[one], part)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=19, height=33, width=47, box=(30, 41), images=F32),
        Case(batch=19, height=28, width=42, patch_size=14, box=(15, 40), dtype=BF16, own=True),
        Case(triggers=5, batch=9, logits=F64, own=True, box=None),
        Case(triggers=2, batch=3, height=224, width=224, box=(64, 64)),
    ],
    ids=str,
)
def test_bits_depend_on_neither_threads_nor_instruction_set(
    case: Case, capability: str, threads: None
) -> None:
    t = case.tensors()
    torch.set_num_threads(1)
    expected = run(case, stamp_triggers, t)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert all(map(torch.equal, run(case, stamp_triggers, t), expected)), f"{count} threads"
    _library.native.set_cpu_capability("scalar")
    assert all(map(torch.equal, run(case, stamp_triggers, t), expected)), f"{capability}"


@pytest.mark.parametrize("patch_size", [None, 2])
@pytest.mark.parametrize(("own", "box"), [(False, (2, 3)), (True, (2, 3)), (True, None)])
def test_gradcheck(own: bool, box: tuple[int, int] | None, patch_size: int | None) -> None:
    case = Case(2, 3, 2, 4, 6, box, own, F64, F64, patch_size=patch_size)
    t = case.tensors()
    images = t.images.clamp(0.01, 0.99)  # away from clip's corners
    assert torch.autograd.gradcheck(
        lambda m, p: stamp_triggers(images, m, p, **case.options(), corners=t.corners),
        (t.mask.requires_grad_(), t.pattern.requires_grad_()),
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.box is not None], ids=str)
def test_buffers(case: Case, capability: str) -> None:
    if case.logits == BF16 or F64 in (case.logits, case.dtype):
        case = replace(case, logits=F64, dtype=None)
    t = case.tensors()
    expected = run(case, stamp_triggers, t)
    common = {**case.options(), "corners": t.corners}
    whole_box = case.box == (case.height, case.width)

    out = torch.full_like(expected[0], torch.nan)
    assert stamp_triggers(t.images, t.mask, t.pattern, **common, out=out) is out
    assert torch.equal(out, expected[0])

    # A second step on the same images: the box is written, the rest is not even looked at.
    out.fill_(torch.nan)
    stamp_triggers(t.images, t.mask, t.pattern, **common, out=out, only_box=True)
    written = ~out.isnan()
    assert torch.equal(out[written], expected[0][written])
    inside = torch.zeros(case.triggers, *to_images(out, case).shape[1:], dtype=torch.bool)
    for k, (rows, columns) in enumerate(t.places()):
        inside[k, ..., rows, columns] = True
    assert torch.equal(to_images(written, case), inside)

    # The upstream gradient outside of the boxes is not read.
    gradient = torch.where(written, t.gradient, torch.nan)
    assert whole_box or gradient.isnan().any()
    buffers = torch.full_like(t.mask, torch.nan), torch.full_like(t.pattern, torch.nan)
    found = stamp_triggers_gradients(gradient, t.images, t.mask, t.pattern, **common, out=buffers)
    assert torch.equal(found.mask_logits, expected[1])
    assert torch.equal(found.pattern_logits, expected[2])


def test_corners_as_numbers() -> None:
    t = Case().tensors()
    assert t.corners is not None
    pairs = [(top, left) for top, left in t.corners.tolist()]
    for stamp in (stamp_triggers, reference.stamp_triggers):
        expected = stamp(t.images, t.mask, t.pattern, corners=t.corners)
        assert torch.equal(stamp(t.images, t.mask, t.pattern, corners=pairs), expected)


@pytest.mark.parametrize("case", [Case(own=True), Case(own=True, patch_size=4, images=F32)])
def test_strides_and_storages_do_not_matter(case: Case, capability: str) -> None:
    t = case.tensors()
    expected = run(case, stamp_triggers, t)

    def strided(x: Tensor) -> Tensor:
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (strided, shifted, turned):
        changed = Tensors(*(change(x) for x in vars(t).values()))
        assert all(map(torch.equal, run(case, stamp_triggers, changed), expected))

    shared = replace(case, own=False)
    views = replace(t, images=t.images[0].expand(t.images.shape))  # stride 0 along the triggers
    expected = run(shared, stamp_triggers, replace(t, images=t.images[0]))
    assert all(map(torch.equal, run(case, stamp_triggers, views), expected))


@pytest.mark.parametrize("patch_size", [None, 2])
@pytest.mark.parametrize(
    "change",
    [
        {"triggers": 0},
        {"triggers": 0, "own": True},
        {"batch": 0},
        {"batch": 0, "own": True},
        {"channels": 0},
        {"box": (0, 3)},
        {"box": (3, 0)},
        {"box": (0, 0)},
        {"box": (0, 0), "height": 0},
    ],
    ids=str,
)
def test_empty(change: dict[str, Any], patch_size: int | None, capability: str) -> None:
    case = replace(Case(patch_size=patch_size), **change)
    t = case.tensors()
    ours, theirs = run(case, stamp_triggers, t), run(case, reference.stamp_triggers, t)
    torch.testing.assert_close(ours[0], theirs[0])
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(our, their)
    out = torch.zeros_like(ours[0])
    stamp_triggers(
        t.images, t.mask, t.pattern, **case.options(), corners=t.corners, out=out, only_box=True
    )
    assert not out.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_pixels_go_where_pytorch_lets_them_go(value: float, capability: str) -> None:
    case = Case(images=F32)
    t = case.tensors()
    t.images.view(-1)[7::19] = value
    for our, their in zip(
        run(case, stamp_triggers, t), run(case, reference.stamp_triggers, t), strict=True
    ):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_loop_over_boxes_allocates_nothing() -> None:
    case = Case(triggers=4, batch=16, height=32, width=32, box=(9, 11))
    t = case.tensors()
    out, buffers = (
        torch.empty_like(t.gradient),
        (torch.empty_like(t.mask), torch.empty_like(t.pattern)),
    )
    common = {**case.options(), "corners": t.corners}
    with torch.profiler.profile(profile_memory=True) as profile:
        stamp_triggers(t.images, t.mask, t.pattern, **common, out=out, only_box=True)
        stamp_triggers_gradients(t.gradient, t.images, t.mask, t.pattern, **common, out=buffers)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) == 0


# ---- as an operator -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(own=True, box=None),
        Case(own=True, patch_size=4, images=BF16, dtype=BF16),
        Case(images=F64, logits=F64),
    ],
    ids=str,
)
def test_opcheck(case: Case) -> None:
    t = case.tensors()
    rest = (MEAN, STD, case.patch_size)
    ops = torch.ops.pydetox
    logits = (t.mask.clone().requires_grad_(), t.pattern.clone().requires_grad_())
    torch.library.opcheck(
        ops.stamp_triggers.default, (t.images, *logits, *rest, t.gradient.dtype, t.corners)
    )
    plain = (t.images, t.mask, t.pattern)
    torch.library.opcheck(
        ops.stamp_triggers_backward.default, (t.gradient, *plain, *rest, t.corners)
    )
    for only_box in {False, t.corners is not None}:
        torch.library.opcheck(
            ops.stamp_triggers_out.default,
            (*plain, *rest, torch.zeros_like(t.gradient), t.corners, only_box),
        )
    buffers = map(torch.zeros_like, (t.mask, t.pattern))
    torch.library.opcheck(
        ops.stamp_triggers_backward_out.default, (t.gradient, *plain, *rest, *buffers, t.corners)
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("patch_size", [None, 4])
@pytest.mark.parametrize("numbers", [False, True])
def test_compile_does_not_break_the_graph(
    backend: str, patch_size: int | None, numbers: bool
) -> None:
    case = Case(own=True, patch_size=patch_size)
    t = case.tensors()
    assert t.corners is not None
    corners = [(1, 2), (0, 13), (7, 0)] if numbers else t.corners

    def loss(stamp: Callable[..., Tensor], images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        stamped = stamp(images, mask * 2, pattern, **case.options(), corners=corners)
        return (stamped.sin() ** 2).sum()

    leaves = (t.mask.requires_grad_(), t.pattern.requires_grad_())
    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for size in (5, 4):
        ours = compiled(stamp_triggers, t.images[:, :size], *leaves)
        theirs = loss(reference.stamp_triggers, t.images[:, :size], *leaves)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device: str) -> None:
    with FakeTensorMode():
        images = torch.empty(2, 4, 3, 8, 8, dtype=U8, device=device)
        mask, pattern = torch.empty(2, 3, 5, device=device), torch.empty(2, 3, 3, 5, device=device)
        corners = torch.empty(2, 2, dtype=torch.int64, device=device)
        stamped = stamp_triggers(images, mask, pattern, patch_size=4, dtype=BF16, corners=corners)
        assert stamped.shape == (2, 4, 4, 48)
        assert stamped.device.type == device
        gradients = torch.ops.pydetox.stamp_triggers_backward.default(
            stamped, images, mask, pattern, MEAN, STD, 4, corners
        )
        assert [g.shape for g in gradients] == [mask.shape, pattern.shape]


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(2, 5, 3, 12, 20)}, r"a batch for each of 3 triggers, found \[2, 5"),
        ({"images": torch.zeros(1, 3, 5, 3, 12, 20)}, r"\[B, C, H, W\] or \[K, B, C, H, W\]"),
        ({"mask": torch.zeros(3, 13, 7)}, r"h <= 12 and w <= 20 .*found \[3, 13, 7\]"),
        ({"mask": torch.zeros(3, 5, 21)}, r"h <= 12 and w <= 20 .*found \[3, 5, 21\]"),
        ({"mask": torch.zeros(5, 7)}, r"with corners, mask_logits must be \[K, h, w\]"),
        ({"pattern": torch.zeros(3, 3, 12, 20)}, r"\[3, 3, 5, 7\] .*found \[3, 3, 12, 20\]"),
        ({"corners": None}, r"mask_logits must be \[K, 12, 20\] .*found \[3, 5, 7\]"),
        ({"corners": torch.zeros(3, 2)}, r"int64 \[3, 2\].*found float32 \[3, 2\]"),
        ({"corners": torch.zeros(2, 2, dtype=torch.int64)}, r"int64 \[3, 2\].*found .*\[2, 2\]"),
        ({"corners": [(0, 0), (0, 0)]}, r"int64 \[3, 2\].*found int64 \[2, 2\]"),
        ({"corners": [1, 2, 3]}, r"for each trigger, found \[1, 2, 3\]"),
        (
            {"corners": [(0, 0), (8, 3), (0, 0)]},
            r"corners\[1\] is \(8, 3\); a box of 5x7 in images of 12x20 has its top in 0..7",
        ),
        ({"corners": [(0, 0), (7, 13), (0, -1)]}, r"corners\[2\] is \(0, -1\).*left in 0..13"),
        ({"only_box": True}, "only_box needs out and corners"),
        ({"only_box": True, "corners": None}, "only_box needs out"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    t = Case().tensors()
    arguments = {"images": t.images, "mask": t.mask, "pattern": t.pattern, "corners": t.corners}
    arguments |= changes
    positional = [arguments.pop(name) for name in ("images", "mask", "pattern")]
    with pytest.raises(UsageError, match=message):
        stamp_triggers(*positional, **arguments)


@pytest.mark.parametrize("corner", [(8, 0), (0, 14), (-1, 0), (0, -1), (2**62, 0), (0, -(2**63))])
def test_values_of_a_tensor_are_checked_on_the_cpu(corner: tuple[int, int]) -> None:
    t = Case().tensors()
    corners = torch.tensor([(0, 0), corner, (7, 13)])
    message = rf"corners\[1\] is \({corner[0]}, {corner[1]}\); a box of 5x7 in images of 12x20"
    out = torch.full_like(t.gradient, torch.nan)
    for call in (
        lambda: stamp_triggers(t.images, t.mask, t.pattern, corners=corners),
        lambda: stamp_triggers(t.images, t.mask, t.pattern, corners=corners, out=out),
        lambda: stamp_triggers_gradients(t.gradient, t.images, t.mask, t.pattern, corners=corners),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(2, 5, 3, 12, 20)},
            r"each of 3 triggers, found \[2, 5, 3",
        ),
        ({"mask_logits": torch.zeros(3, 13, 7)}, r"h <= 12 and w <= 20 .*found \[3, 13, 7\]"),
        ({"pattern_logits": torch.zeros(3, 3, 5, 8)}, r"\[3, 3, 5, 7\].*found \[3, 3, 5, 8\]"),
        (
            {"corners": None},
            r"must be \[K, 12, 20\] for images .*found \[3, 5, 7\]",
        ),
        (
            {"corners": torch.zeros(2, 2, dtype=torch.int64)},
            r"int64 \[3, 2\].*found int64 \[2, 2\]",
        ),
        ({"corners": torch.zeros(3, 2)}, r"corners must be int64.*found float32"),
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any], message: str) -> None:
    t = Case().tensors()
    arguments: dict[str, Any] = {
        "images": t.images,
        "mask_logits": t.mask,
        "pattern_logits": t.pattern,
        "mean": MEAN,
        "std": STD,
        "patch_size": None,
        "dtype": F32,
        "corners": t.corners,
    } | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.pydetox.stamp_triggers(**arguments)
    del arguments["dtype"]
    with pytest.raises(ValueError, match=message):
        torch.ops.pydetox.stamp_triggers_backward(gradient=t.gradient, **arguments)


def test_only_box_without_a_box() -> None:
    t = Case(box=None).tensors()
    with pytest.raises(ValueError, match="only_box needs corners"):
        torch.ops.pydetox.stamp_triggers_out(
            t.images, t.mask, t.pattern, MEAN, STD, None, torch.empty_like(t.gradient), None, True
        )
