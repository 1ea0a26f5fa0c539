"""Values and gradients of stamp_triggers, against extended precision and against plain PyTorch."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pydetox.errors import UsageError
from pydetox.ops import reference, stamp_triggers, stamp_triggers_gradients

U8, BF16, F32, F64 = torch.uint8, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call; the defaults are a small ordinary one."""

    triggers: int = 3
    batch: int = 5
    channels: int = 3
    height: int = 12
    width: int = 20
    images: torch.dtype = U8
    logits: torch.dtype = F32
    dtype: torch.dtype | None = None
    patch_size: int | None = None
    seed: int = 0
    mean: tuple[float, ...] | None = field(default=(0.48, 0.46, 0.41))
    std: tuple[float, ...] | None = field(default=(0.27, 0.26, 0.28))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """images, mask_logits, pattern_logits and an upstream gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        plane = (self.height, self.width)
        shape = (self.batch, self.channels, *plane)
        if self.images == U8:
            images = torch.randint(0, 256, shape, dtype=U8, generator=generator)
        else:  # beyond [0, 1] too, so that clip has something to do
            images = (torch.rand(shape, dtype=F64, generator=generator) * 1.4 - 0.2).to(self.images)
        mask = torch.randn(self.triggers, *plane, dtype=F64, generator=generator)
        pattern = torch.randn(self.triggers, self.channels, *plane, dtype=F64, generator=generator)
        mask, pattern = (t.to(self.logits).requires_grad_() for t in (mask, pattern))
        output = reference.stamp_triggers(images, mask.detach(), pattern.detach(), **self.options())
        gradient = torch.randn(output.shape, dtype=F64, generator=generator)
        return images, mask, pattern, gradient.to(output.dtype)

    def options(self) -> dict[str, object]:
        return {
            "mean": None if self.mean is None else self.mean[: self.channels],
            "std": None if self.std is None else self.std[: self.channels],
            "patch_size": self.patch_size,
            "dtype": self.dtype,
        }

    def run(self, stamp) -> list[Tensor]:
        """The result and the gradients of mask_logits and pattern_logits."""
        images, mask, pattern, gradient = self.tensors()
        output = stamp(images, mask, pattern, **self.options())
        assert output.shape == gradient.shape
        assert output.dtype == gradient.dtype == (self.dtype or self.logits)
        return [output.detach(), *torch.autograd.grad(output, (mask, pattern), gradient)]


def truth(case: Case) -> list[np.ndarray]:
    """What `Case.run` computes, by its formulas in extended precision, without torch."""
    images, mask, pattern, gradient = (
        t.detach().to(F64).numpy().astype(np.longdouble) for t in case.tensors()
    )
    per_channel = (1, 1, case.channels, 1, 1)
    mean = np.array((case.mean or (0, 0, 0))[: case.channels], np.longdouble).reshape(per_channel)
    std = np.array((case.std or (1, 1, 1))[: case.channels], np.longdouble).reshape(per_channel)
    x = images[None] / (255 if case.images == U8 else 1)
    m = (np.tanh(mask) / 2 + 0.5)[:, None, None]
    p = (np.tanh(pattern) / 2 + 0.5)[:, None]
    blend = (1 - m) * x + m * p
    output = (np.clip(blend, 0, 1) - mean) / std

    full = (case.triggers, case.batch, case.channels, case.height, case.width)
    if case.patch_size is not None:
        size = case.patch_size
        rows, columns = case.height // size, case.width // size
        output = output.reshape(*full[:3], rows, size, columns, size)
        output = output.transpose(0, 1, 3, 5, 2, 4, 6).reshape(gradient.shape)
        gradient = gradient.reshape(*full[:2], rows, columns, case.channels, size, size)
        gradient = gradient.transpose(0, 1, 4, 2, 5, 3, 6).reshape(full)
    g = np.where((blend >= 0) & (blend <= 1), gradient / std, 0)
    mask_gradient = (g * (p - x)).sum((1, 2)) * (1 - np.tanh(mask) ** 2) / 2
    pattern_gradient = (g * m).sum(1) * (1 - np.tanh(pattern) ** 2) / 2
    return [output, mask_gradient, pattern_gradient]


def errors(results: list[Tensor], exact: list[np.ndarray]) -> list[float]:
    return [
        float(np.abs(result.to(F64).numpy() - value).max(initial=0))
        for result, value in zip(results, exact, strict=True)
    ]


DTYPES = [
    Case(images=U8, logits=F32),
    Case(images=F32, logits=F32),
    Case(images=F64, logits=F32),
    Case(images=BF16, logits=F32),
    Case(images=U8, logits=F64),
    Case(images=F32, logits=F64),
    Case(images=F64, logits=F64),
    Case(images=BF16, logits=F64),
    Case(images=U8, logits=BF16),
    Case(images=BF16, logits=BF16),
    Case(images=U8, logits=F32, dtype=BF16),
    Case(images=F32, logits=F32, dtype=F64),
    Case(images=F32, logits=F64, dtype=F32),
    Case(images=U8, logits=F64, dtype=BF16),
    Case(images=U8, logits=BF16, dtype=F32),
]
SIZES = [
    Case(triggers=1, batch=1, channels=1, height=1, width=1),
    Case(triggers=2, batch=17, height=31, width=29, images=F32),  # odd, more than two chunks
    Case(triggers=2, batch=8, channels=2, height=7, width=5, images=F32),
    Case(triggers=70, batch=2, height=9, width=11),
    Case(triggers=1, batch=300, height=8, width=8, images=F32),
    Case(triggers=1, batch=2, height=224, width=224),  # more than one tile
    Case(mean=None, std=None, images=F32),
    Case(mean=None, images=F64, logits=F64),
]
PATCHES = [
    Case(height=12, width=20, patch_size=4),
    Case(height=12, width=20, patch_size=2, images=F32, batch=9),
    Case(height=12, width=20, patch_size=1),
    Case(height=28, width=42, patch_size=14, images=F32),
    Case(height=64, width=32, patch_size=32, dtype=BF16),
    Case(height=15, width=9, patch_size=3, logits=F64, images=F64, channels=2),
    Case(height=96, width=96, patch_size=48, batch=2),
    Case(height=7, width=7, patch_size=7, logits=BF16),
]


@pytest.mark.parametrize("case", DTYPES + SIZES + PATCHES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(case: Case, capability: str) -> None:
    exact = truth(case)
    ours = errors(case.run(stamp_triggers), exact)
    theirs = errors(case.run(reference.stamp_triggers), exact)
    scale = [float(np.abs(value).max(initial=0)) for value in exact]
    for name, our, their, size in zip(
        ("output", "mask gradient", "pattern gradient"), ours, theirs, scale, strict=True
    ):
        # Where PyTorch is exact by luck (a single pixel), one rounding of the largest is allowed.
        rounding = torch.finfo(case.dtype if name == "output" and case.dtype else case.logits).eps
        assert our <= max(2 * their, rounding * size / 2), f"{name}: {our:.3g}, PyTorch {their:.3g}"


@pytest.mark.parametrize(
    ("dtype", "width", "patch_size"), [(F32, 155, None), (BF16, 157, None), (F32, 160, 16)]
)
def test_results_too_large_for_the_caches(
    dtype: torch.dtype, width: int, patch_size: int | None, capability: str
) -> None:
    case = Case(9, 8, height=160, width=width, dtype=dtype, patch_size=patch_size)
    ours, theirs = case.run(stamp_triggers), case.run(reference.stamp_triggers)
    assert ours[0].nbytes > 8 << 20
    tolerance = 2e-6 if dtype == F32 else 2e-2
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=19, height=33, width=47, images=F32),
        Case(batch=19, height=28, width=42, patch_size=14, dtype=BF16),
        Case(triggers=5, batch=9, height=16, width=16, logits=F64),
        Case(triggers=2, batch=3, height=224, width=224),
    ],
    ids=str,
)
def test_bits_depend_on_neither_threads_nor_instruction_set(
    case: Case, capability: str, threads: None
) -> None:
    torch.set_num_threads(1)
    expected = case.run(stamp_triggers)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert all(map(torch.equal, case.run(stamp_triggers), expected)), f"{count} threads"
    from pydetox.ops import _library

    _library.native.set_cpu_capability("scalar")
    assert all(map(torch.equal, case.run(stamp_triggers), expected)), f"{capability} is not scalar"


def test_rows_are_what_a_vision_transformer_multiplies() -> None:
    case = Case(height=28, width=42, patch_size=14, logits=F64)
    images, mask, pattern, _ = case.tensors()
    options = case.options()
    rows = stamp_triggers(images, mask, pattern, **options)
    stamped = stamp_triggers(images, mask, pattern, **(options | {"patch_size": None}))
    weight = torch.randn(11, 3, 14, 14, dtype=F64, generator=torch.Generator().manual_seed(1))
    embedded = functional.conv2d(stamped.flatten(0, 1), weight, stride=14)  # [KB, 11, 2, 3]
    expected = embedded.flatten(2).transpose(1, 2).unflatten(0, rows.shape[:2])
    torch.testing.assert_close(rows @ weight.flatten(1).T, expected)


@pytest.mark.parametrize("patch_size", [None, 2])
def test_gradcheck(patch_size: int | None) -> None:
    images, mask, pattern, _ = Case(2, 3, 2, 4, 6, F64, F64, patch_size=patch_size).tensors()
    images = images.clamp(0.01, 0.99)  # away from clip's corners
    options = {"mean": (0.4, 0.5), "std": (0.2, 0.3), "patch_size": patch_size}
    assert torch.autograd.gradcheck(
        lambda m, p: stamp_triggers(images, m, p, **options), (mask, pattern)
    )


@pytest.mark.parametrize("patch_size", [None, 4])
def test_strides_do_not_matter(patch_size: int | None, capability: str) -> None:
    case = Case(3, 6, 3, 8, 12, F32, patch_size=patch_size)
    images, mask, pattern, gradient = (t.detach() for t in case.tensors())
    options = case.options()

    def run(images: Tensor, mask: Tensor, pattern: Tensor, gradient: Tensor) -> list[Tensor]:
        mask, pattern = mask.requires_grad_(), pattern.requires_grad_()
        output = stamp_triggers(images, mask, pattern, **options)
        assert output.is_contiguous()
        return [output.detach(), *torch.autograd.grad(output, (mask, pattern), gradient)]

    def strided(t: Tensor) -> Tensor:
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    expected = run(images, mask, pattern, gradient)
    for view in (
        run(*(strided(t) for t in (images, mask, pattern, gradient))),
        run(
            *(
                t.transpose(0, -1).contiguous().transpose(0, -1)
                for t in (images, mask, pattern, gradient)
            )
        ),
        run(images.contiguous(memory_format=torch.channels_last), mask, pattern, gradient),
    ):
        assert all(map(torch.equal, view, expected))

    ones = torch.ones(()).expand(gradient.shape)  # what sum() sends back: all strides 0
    assert all(
        map(
            torch.equal,
            run(images, mask, pattern, ones)[1:],
            run(images, mask, pattern, ones.contiguous())[1:],
        )
    )


def test_storage_may_start_anywhere(capability: str) -> None:
    case = Case(2, 3, images=F32, height=9, width=16)
    images, mask, pattern, _ = (t.detach() for t in case.tensors())

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=t.dtype), t.flatten()])[1:].view(t.shape)

    expected = stamp_triggers(images, mask, pattern)
    assert torch.equal(stamp_triggers(*map(shifted, (images, mask, pattern))), expected)


@pytest.mark.parametrize("empty", ["triggers", "batch", "channels", "height", "width"])
@pytest.mark.parametrize("patch_size", [None, 2])
def test_empty(empty: str, patch_size: int | None, capability: str) -> None:
    case = Case(**({"height": 4, "width": 6, "patch_size": patch_size} | {empty: 0}))
    ours, theirs = case.run(stamp_triggers), case.run(reference.stamp_triggers)
    assert ours[0].numel() == 0
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)  # no images: the gradients are zero, not garbage


def test_clip_stops_gradients_outside_and_not_on_the_border(capability: str) -> None:
    # With m = 1/2 and p = 1/2 the blend is x/2 + 1/4: -1/4, 0, 1/2, 1, 5/4.
    images = torch.tensor([-1.0, -0.5, 0.5, 1.5, 2.0]).view(5, 1, 1, 1)
    mask = torch.zeros(1, 1, 1, requires_grad=True)
    pattern = torch.zeros(1, 1, 1, 1, requires_grad=True)
    output = stamp_triggers(images, mask, pattern)
    assert output.flatten().tolist() == [0, 0, 0.5, 1, 1]
    for i, passes in enumerate([False, True, True, True, False]):
        (gradient,) = torch.autograd.grad(output[0, i].sum(), pattern, retain_graph=True)
        assert gradient.item() == (0.25 if passes else 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("logits", [F32, F64])
def test_nan_and_infinity_go_where_pytorch_lets_them_go(
    value: float, logits: torch.dtype, capability: str
) -> None:
    case = Case(2, 3, 3, 5, 33, F32, logits)
    for poisoned in range(3):
        images, mask, pattern, gradient = (t.detach().clone() for t in case.tensors())
        (images, mask, pattern)[poisoned].view(-1)[7::19] = value
        results = []
        for stamp in (stamp_triggers, reference.stamp_triggers):
            leaves = [t.clone().requires_grad_() for t in (mask, pattern)]
            output = stamp(images, *leaves, **case.options())
            results.append([output.detach(), *torch.autograd.grad(output, leaves, gradient)])
        for our, their in zip(*results, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_two_threads_share_the_work(threads: None) -> None:
    """Enough items for many threads, even for one small image, and never one without work."""
    for count in (1, 2, 8, 64):
        torch.set_num_threads(count)
        case = Case(triggers=9, batch=2, height=16, width=16)
        torch.testing.assert_close(
            case.run(stamp_triggers)[0], case.run(reference.stamp_triggers)[0]
        )


# ---- into memory of the caller ------------------------------------------------------------------

OUT_CASES = [
    Case(),
    Case(patch_size=4, dtype=BF16),
    Case(logits=F64, images=F64, height=7, width=9),
    Case(triggers=2, batch=17, channels=1, images=BF16),
    Case(batch=0),
    Case(triggers=0),
]


@pytest.mark.parametrize("case", OUT_CASES, ids=str)
def test_buffers_get_the_bits_that_autograd_gets(case: Case, capability: str) -> None:
    expected, *expected_gradients = case.run(stamp_triggers)
    images, mask, pattern, gradient = case.tensors()
    options = {k: v for k, v in case.options().items() if k != "dtype"}
    out = torch.full_like(expected, torch.nan)
    assert stamp_triggers(images, mask, pattern, **options, out=out) is out
    assert torch.equal(out, expected)
    assert not out.requires_grad
    buffers = tuple(torch.full_like(t, torch.nan, requires_grad=False) for t in (mask, pattern))
    found = stamp_triggers_gradients(gradient, images, mask, pattern, **options, out=buffers)
    assert found.mask_logits is buffers[0]
    fresh = stamp_triggers_gradients(gradient, images, mask, pattern, **options)
    for one, two, three in zip(found, fresh, expected_gradients, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(two, three)


def test_a_loop_with_buffers_allocates_nothing() -> None:
    case = Case(triggers=4, batch=16, height=32, width=32)
    images, mask, pattern, gradient = case.tensors()
    out = torch.empty_like(gradient)
    buffers = torch.empty_like(mask), torch.empty_like(pattern)
    buffers = tuple(b.requires_grad_(False) for b in buffers)
    options = {k: v for k, v in case.options().items() if k != "dtype"}

    def step() -> None:
        stamp_triggers(images, mask, pattern, **options, out=out)
        stamp_triggers_gradients(gradient, images, mask, pattern, **options, out=buffers)

    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["out"][:, :4], r"out must be float32 \[3, 5, 3, 12, 20\]"),
        (lambda t: t["out"].double(), "found float64"),
        (lambda t: t["out"].transpose(3, 4).contiguous().transpose(3, 4), "contiguous"),
        (lambda t: t["out"].requires_grad_(), "must not require a gradient"),
        (lambda t: t["pattern"].new_empty(0).set_(t["store"], 4, t["out"].shape), "share memory"),
    ],
)
def test_unusable_buffers_are_refused(change, message: str) -> None:
    images, mask, pattern, gradient = Case().tensors()
    store = torch.UntypedStorage(gradient.nbytes + 4 * (pattern.numel() + 4))
    pattern = torch.empty(0).set_(store, 0, pattern.shape).copy_(pattern.detach())
    out = change({"out": torch.empty_like(gradient), "pattern": pattern, "store": store})
    with pytest.raises(UsageError, match=message):
        stamp_triggers(images, mask, pattern, out=out)


def test_gradients_refuse_what_does_not_fit() -> None:
    images, mask, pattern, gradient = Case().tensors()
    with pytest.raises(UsageError, match=r"gradient must be \[3, 5, 3, 12, 20\]"):
        stamp_triggers_gradients(gradient[:2], images, mask, pattern)
    with pytest.raises(UsageError, match=r"found float64 for float32"):
        stamp_triggers_gradients(gradient.double(), images, mask, pattern)
    with pytest.raises(UsageError, match="pattern_logits_gradient must be"):
        stamp_triggers_gradients(
            gradient, images, mask, pattern, out=(mask.detach().clone(), mask.detach().clone())
        )
    same = torch.empty(mask.numel() + pattern.numel())
    overlapping = same[: mask.numel()].view(mask.shape), same[: pattern.numel()].view(pattern.shape)
    with pytest.raises(UsageError, match="mask_logits_gradient must not share memory"):
        stamp_triggers_gradients(gradient, images, mask, pattern, out=overlapping)
    with pytest.raises(UsageError, match="found bfloat16 and bfloat16"):
        stamp_triggers_gradients(gradient.bfloat16(), images, mask.bfloat16(), pattern.bfloat16())
