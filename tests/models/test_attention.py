"""Attention of a frozen tower: right, its gradient in one piece, and never by a wrong kernel."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pydetox.models import attention
from pydetox.models.attention import (
    EFFICIENT,
    FLASH,
    FLASH_ON_CPU,
    FusedAttention,
    choose_attention,
    deviation,
    only_kernel,
    side_by_side,
)
from pydetox.models.frozen import freeze
from tests.mini import mini_model

CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {"stack", "cat", "clone", "copy_", "_to_copy", "contiguous", "new_zeros", "zeros_like"}
COPIES |= {"select_backward", "add"}


class Copies(TorchDispatchMode):
    """Counts the operators that copy or clear memory."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in COPIES:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_chosen_yet(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", {})


@pytest.mark.parametrize("head_size", [1, 3, 8, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_of_cpus_equals_plain_products(head_size, dtype):
    assert deviation(FLASH_ON_CPU, CPU, dtype, head_size) < (3e-6 if dtype.itemsize == 4 else 1e-13)
    assert choose_attention(CPU, dtype, head_size).kernel is FLASH_ON_CPU


@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 4), (1, 1, 3, 1, 3), (3, 7, 2, 1, 1)])
def test_gradients_are_those_of_finite_differences(shape):
    packed = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    packed.requires_grad_()
    queries = None
    if shape[2] == 2:
        queries = torch.linspace(-1, 1, shape[0], dtype=torch.float64).view(-1, 1, 1, 1)
        queries.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: FusedAttention.apply(FLASH_ON_CPU, *given), (packed, queries)
    )


def test_the_gradient_of_query_key_and_value_is_written_side_by_side_once():
    """Of what the projection gave: one copy, in the layout that its product takes."""
    projected = torch.randn(4 * 10, 3 * 32, generator=torch.Generator().manual_seed(0))
    projected.requires_grad_()
    chosen = choose_attention(CPU, torch.float32, 16)
    mixed = chosen(projected.view(4, 10, 3, 2, 16))
    pull = torch.ones_like(mixed)
    with Copies() as copies:
        (gradient,) = torch.autograd.grad(mixed, projected, pull)
    assert copies.seen == {"stack": 1}
    assert gradient.is_contiguous()
    # torch's own function: each of the three into zeros of all, added up, and copied once more.
    with only_kernel(None):
        theirs = choose_attention(CPU, torch.float32, 16)
    again = theirs(projected.view(4, 10, 3, 2, 16))
    with Copies() as copies:
        (expected,) = torch.autograd.grad(again, projected, pull)
    assert copies.seen == {"select_backward": 3, "add": 2, "clone": 1}
    torch.testing.assert_close(gradient, expected)


def test_what_lies_side_by_side_already_is_not_copied():
    whole = torch.arange(2 * 5 * 3 * 2 * 4.0).view(2, 5, 3, 2, 4)
    joined = side_by_side(whole.unbind(2))
    assert joined.data_ptr() == whole.data_ptr()
    assert torch.equal(joined, whole)
    assert joined.is_contiguous()
    swapped = side_by_side((whole[:, :, 1], whole[:, :, 0], whole[:, :, 2]))
    assert torch.equal(swapped, whole[:, :, [1, 0, 2]])
    two = side_by_side(whole.unbind(2)[1:])  # with a hole before each: copied
    assert torch.equal(two, whole[:, :, 1:])
    assert two.is_contiguous()


@pytest.mark.parametrize(
    ("kernel", "dtype", "copies"),
    [(FLASH, torch.bfloat16, {"stack": 1}), (EFFICIENT, torch.float32, {})],
)
def test_the_kernels_of_gpus_take_and_give_what_torch_says(kernel, dtype, copies):
    """Tensors without data pretend to be on a GPU: schemas, shapes, strides, devices, copies."""
    with FakeTensorMode():
        packed = torch.empty(4, 50, 3, 12, 64, dtype=dtype, device="cuda")
        parts = packed.unbind(2)
        mixed, kept = kernel.forward(*parts)
        assert (mixed.shape, mixed.dtype, mixed.device.type) == ((4, 50, 12, 64), dtype, "cuda")
        assert mixed.is_contiguous()  # so that its rows are a view
        with Copies() as seen:
            gradient = side_by_side(kernel.backward(torch.empty_like(mixed), parts, mixed, kept))
        assert gradient.shape == packed.shape
        assert gradient.is_contiguous()
        assert gradient.dtype == dtype
        assert seen.seen == copies
        both = torch.empty(4, 50, 2, 12, 64, dtype=dtype, device="cuda")
        parts = (torch.empty(4, 1, 12, 64, dtype=dtype, device="cuda"), *both.unbind(2))
        mixed, kept = kernel.forward(*parts)
        assert mixed.shape == (4, 1, 12, 64)
        found = kernel.backward(torch.empty_like(mixed), parts, mixed, kept)
        assert [g.shape for g in found] == [part.shape for part in parts]
        assert side_by_side(found[1:]).shape == both.shape


@pytest.mark.parametrize(
    ("dtype", "head_size", "kernel"),
    [
        (torch.bfloat16, 64, FLASH),
        (torch.float16, 80, FLASH),
        (torch.float32, 64, EFFICIENT),
        (torch.bfloat16, 36, None),  # torch would fill up such heads: its own function does
        (torch.bfloat16, 256, None),
        (torch.float64, 64, None),
    ],
)
def test_the_kernel_of_a_gpu_is_pinned(dtype, head_size, kernel):
    assert attention._fitting(torch.device("cuda", 0), dtype, head_size) is kernel


class Wrong:
    name = "wrong attention"

    def forward(self, query, key, value):
        mixed, kept = FLASH_ON_CPU.forward(query, key, value)
        return mixed * 1.01, kept

    def backward(self, *given):
        return FLASH_ON_CPU.backward(*given)


class Broken(Wrong):
    name = "broken attention"

    def forward(self, query, key, value):
        raise NotImplementedError("no kernel for this device\nand a stack")


class Vain(Wrong):
    name = "vain attention"

    def backward(self, *given):
        return tuple(torch.full_like(g, torch.nan) for g in FLASH_ON_CPU.backward(*given))


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (Wrong(), "wrong attention is off by 0.01 in the trial"),
        (Broken(), "broken attention failed in the trial: no kernel for this device"),
        (Vain(), "vain attention is off by nan in the trial"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_not_used_and_that_is_said(monkeypatch, kernel, says):
    monkeypatch.setattr(attention, "_fitting", lambda *_: kernel)
    model = mini_model()
    tower = freeze(model.visual)
    assert tower.description.endswith(f"attention by torch's choice: {says}")
    rows = torch.randn(3, 4, 192, generator=torch.Generator().manual_seed(0))
    found = tower(rows)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_chosen", {})
    good = freeze(model.visual)
    assert good.description == "frozen vision transformer, float32, FlashAttention for CPUs"
    torch.testing.assert_close(found, good(rows))


def test_the_first_use_may_be_in_a_mode_without_gradients():
    with torch.inference_mode():
        assert choose_attention(CPU, torch.float32, 16).kernel is FLASH_ON_CPU


def test_a_kernel_is_tried_once(monkeypatch):
    tried = []
    original = attention.deviation
    monkeypatch.setattr(
        attention, "deviation", lambda *given: tried.append(given) or original(*given)
    )
    for _ in range(3):
        choose_attention(CPU, torch.float32, 16)
        choose_attention(CPU, torch.float32, 8)
    assert len(tried) == 2
