"""Values and gradients of the objectives, against extended precision and against plain PyTorch."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from pydetox.errors import UsageError
from pydetox.ops import _library, embedding_collapse, reference, zero_shot_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# K, B, D, C
SIZES = [
    (1, 2, 1, 1),
    (3, 5, 7, 4),
    (2, 17, 129, 37),  # odd; more than one vector, chunk of dimensions and group of rows
    (10, 16, 512, 10),  # the search's
    (1, 33, 64, 300),  # more than one chunk of classes
    (40, 2, 3, 5),
]


def make(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, not centred and of any length, unit head, targets, and an upstream gradient."""
    triggers, images, dim, classes = sizes
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    z = 3 * randn(triggers, images, dim) + 2 * randn(triggers, 1, dim)
    head = normalize(randn(classes, dim), dim=-1)
    targets = torch.randint(0, classes, (triggers,), generator=generator)
    return z.to(dtype), head.to(dtype), targets, randn(triggers)


def longdoubles(*tensors: Tensor) -> list[np.ndarray]:
    return [t.double().numpy().astype(np.longdouble) for t in tensors]


def exact_collapse(z: Tensor, upstream: Tensor) -> list[np.ndarray]:
    """Cosine and gradient by the sum over pairs, in extended precision, without torch."""
    (x, up) = longdoubles(z, upstream)
    count = x.shape[1]
    norm = np.sqrt((x**2).sum(-1, keepdims=True))
    u = x / norm
    pairs = u @ u.swapaxes(1, 2)
    cosine = (pairs.sum((1, 2)) - np.trace(pairs, axis1=1, axis2=2)) / (count * (count - 1))
    pull = 2 * (u.sum(1, keepdims=True) - u) / (count * (count - 1))
    gradient = (pull - (pull * u).sum(-1, keepdims=True) * u) / norm
    return [cosine, up[:, None, None] * gradient]


def exact_zero_shot(
    z: Tensor, head: Tensor, targets: Tensor, scale: float, upstream: Tensor
) -> list[np.ndarray]:
    (x, w, up) = longdoubles(z, head, upstream)
    norm = np.sqrt((x**2).sum(-1, keepdims=True))
    u = x / norm
    logits = scale * u @ w.T
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    rows = np.arange(len(x))
    loss = (np.log(total) + largest)[..., 0].mean(1) - logits[rows, :, targets.numpy()].mean(1)
    share = weights / total
    share[rows, :, targets.numpy()] -= 1
    pull = scale * share @ w / x.shape[1]
    gradient = (pull - (pull * u).sum(-1, keepdims=True) * u) / norm
    return [loss, up[:, None, None] * gradient]


def run(operator, z: Tensor, upstream: Tensor, *arguments: object) -> list[Tensor]:
    """The result and the gradient of z; of a zero-shot loss the success, too."""
    leaf = z.detach().clone().requires_grad_()
    value, *rest = result if isinstance(result := operator(leaf, *arguments), tuple) else (result,)
    (gradient,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return [value.detach(), gradient, *rest]


def error(found: Tensor, exact: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() - exact).max(initial=0))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, capability: str
) -> None:
    z, head, targets, upstream = make(sizes, dtype)
    cases = [
        ("embedding_collapse", embedding_collapse, (), exact_collapse(z, upstream), 1.0),
        (
            "zero_shot_loss",
            zero_shot_loss,
            (head, targets, 30.0),
            exact_zero_shot(z, head, targets, 30.0, upstream),
            30.0,  # what the logits are rounded at
        ),
    ]
    for name, operator, arguments, exact, scale in cases:
        found = run(operator, z, upstream, *arguments)
        plain = run(getattr(reference, name), z, upstream, *arguments)
        for ours, theirs, truth in zip(found, plain, exact, strict=False):
            slack = 4 * torch.finfo(dtype).eps * max(scale, float(np.abs(truth).max()))
            if ours.dim() > 1:  # gradients: next to what they are made of
                slack *= float(upstream.abs().max() / z.double().norm(dim=-1).min())
            assert ours.dtype == dtype
            assert error(ours, truth) <= 2 * error(theirs, truth) + slack
    _, _, success = found
    logits = normalize(z.double(), dim=-1) @ head.double().T
    expected = logits.argmax(-1).eq(targets[:, None]).to(dtype).mean(1)
    torch.testing.assert_close(success, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(3, 5, 7, 4), (1, 2, 3, 1), (2, 17, 33, 20)], ids=str)
def test_gradcheck(sizes: tuple[int, int, int, int]) -> None:
    z, head, targets, _ = make(sizes, F64)
    z.requires_grad_()
    assert torch.autograd.gradcheck(embedding_collapse, z)
    assert torch.autograd.gradcheck(lambda e: zero_shot_loss(e, head, targets, 7.0)[0], z)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, head, targets, upstream = make((3, 5, 40, 7), dtype)
    for operator, arguments in ((embedding_collapse, ()), (zero_shot_loss, (head, targets, 9.0))):
        value, gradient, *_ = run(operator, z, upstream, *arguments)
        wide = [a.float() if isinstance(a, Tensor) and a is head else a for a in arguments]
        expected, wide_gradient, *_ = run(operator, z.float(), upstream, *wide)
        assert value.dtype == F32
        assert torch.equal(value, expected)
        assert torch.equal(gradient, wide_gradient.to(dtype))


def test_bits_depend_on_neither_threads_nor_instruction_set_nor_company(
    capability: str, threads: None
) -> None:
    for dtype in (F32, F64):
        z, head, targets, upstream = make((7, 19, 150, 300), dtype)
        results = []
        for count, name in ((2, capability), (1, capability), (1, "scalar")):
            torch.set_num_threads(count)
            _library.native.set_cpu_capability(name)
            results.append(
                [
                    *run(embedding_collapse, z, upstream),
                    *run(zero_shot_loss, z, upstream, head, targets, 20.0),
                ]
            )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        # One trigger alone.
        alone = run(zero_shot_loss, z[3:4], upstream[3:4], head, targets[3:4], 20.0)
        assert all(torch.equal(a, b[3:4]) for a, b in zip(alone, results[0][2:], strict=True))


def test_strides_and_alignment_do_not_matter(capability: str) -> None:
    z, head, targets, _ = make((3, 6, 37, 11), F32)

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), 7, dtype=t.dtype)
        wide[..., 1] = t
        return wide[..., 1]

    def shifted(t: Tensor) -> Tensor:
        moved = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
        return moved.copy_(t)

    expected = [embedding_collapse(z), *zero_shot_loss(z, head, targets, 5.0)]
    for change in (strided, shifted):
        found = [
            embedding_collapse(change(z)),
            *zero_shot_loss(change(z), change(head), change(targets), 5.0),
        ]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    leaf = z.clone().requires_grad_()
    value = embedding_collapse(leaf)
    plain = torch.autograd.grad(value, leaf, torch.ones(3), retain_graph=True)
    expanded = torch.autograd.grad(value, leaf, torch.ones(1).expand(3))
    assert torch.equal(plain[0], expanded[0])


def test_a_row_of_zeros(capability: str) -> None:
    z, head, targets, _ = make((2, 4, 6, 5), F64)
    z[0, 1] = 0
    targets[0] = 0  # the first of equal logits
    leaf = z.clone().requires_grad_()
    loss, success = zero_shot_loss(leaf, head, targets, 9.0)
    plain, plain_success = reference.zero_shot_loss(z, head, targets, 9.0)
    torch.testing.assert_close(loss, plain)
    assert torch.equal(success, plain_success)
    torch.testing.assert_close(embedding_collapse(z), reference.embedding_collapse(z))
    for value in (loss, embedding_collapse(leaf)):
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert not gradient[0, 1].any()
        assert gradient.isfinite().all()
    alone = torch.zeros(1, 3, 6)
    assert zero_shot_loss(alone, head.float(), torch.tensor([1]), 9.0)[0].item() == pytest.approx(
        math.log(5)
    )
    assert embedding_collapse(alone).item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(value: float, capability: str) -> None:
    for where in ((1, 2, 3), (1, 0, 0)):
        z, head, targets, _ = make((3, 4, 20, 5), F32)
        z[where] = value
        targets[1] = 0
        leaf = z.clone().requires_grad_()
        loss, success = zero_shot_loss(leaf, head, targets, 7.0)
        cosine = embedding_collapse(leaf)
        for found in (loss, cosine):
            assert found.isnan().tolist() == [False, True, False]
            (gradient,) = torch.autograd.grad(found.sum(), leaf)
            assert gradient[[0, 2]].isfinite().all()
            assert gradient[1, where[1]].isnan().all()
        assert success[1] <= 0.75  # the row is no success
        plain_loss, plain_success = reference.zero_shot_loss(z, head, targets, 7.0)
        torch.testing.assert_close(loss, plain_loss, equal_nan=True)
        assert torch.equal(success, plain_success)


def test_extremes_of_the_logits() -> None:
    """A target far behind, and one so far ahead that the loss is the others' weight alone."""
    head = torch.eye(3)
    z = torch.tensor([[[1.0, 0, 0]]])
    behind, _ = zero_shot_loss(z, head, torch.tensor([1]), 1e4)
    assert behind.item() == 1e4
    for scale in (20.0, 60.0):
        ahead, success = zero_shot_loss(z, head, torch.tensor([0]), scale)
        assert ahead.item() == pytest.approx(2 * math.exp(-scale), rel=1e-6)
        assert success.item() == 1
    huge, tiny = (zero_shot_loss(z * f, head, torch.tensor([1]), 9.0)[0] for f in (1e30, 1e-30))
    assert huge.item() == tiny.item() == zero_shot_loss(z, head, torch.tensor([1]), 9.0)[0].item()
    pair = torch.tensor([[[1e30, 0], [1e-30, 0]]])
    assert embedding_collapse(pair).item() == 1


def test_no_triggers(capability: str) -> None:
    z, head = torch.zeros(0, 3, 4, requires_grad=True), torch.eye(4)
    loss, success = zero_shot_loss(z, head, torch.zeros(0, dtype=torch.int64), 1.0)
    assert loss.shape == success.shape == embedding_collapse(z).shape == (0,)
    assert torch.autograd.grad(loss.sum(), z)[0].shape == (0, 3, 4)
    assert torch.autograd.grad(embedding_collapse(z).sum(), z)[0].shape == (0, 3, 4)


def test_the_gradient_is_computed_only_where_it_is_wanted() -> None:
    z, head, targets, _ = make((2, 3, 4, 5), F32)
    assert not zero_shot_loss(z, head, targets, 1.0)[0].requires_grad
    z.requires_grad_()
    loss, success = zero_shot_loss(z, head, targets, 1.0)
    assert loss.requires_grad
    assert not success.requires_grad
    with torch.no_grad():
        assert not zero_shot_loss(z, head, targets, 1.0)[0].requires_grad
    raw = torch.ops.pydetox.zero_shot_loss.default(z, head, targets, 1.0, False)
    with pytest.raises(UsageError, match="called without a gradient"):
        raw[0].sum().backward()


def test_double_backward_is_refused_by_name() -> None:
    z, head, targets, _ = make((2, 3, 4, 5), F64)
    z.requires_grad_()
    for name, value in (
        ("embedding_collapse", embedding_collapse(z)),
        ("zero_shot_loss", zero_shot_loss(z, head, targets, 1.0)[0]),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        with pytest.raises(UsageError, match=f"{name} cannot be differentiated twice"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_does_not_break_the_graph(backend: str) -> None:
    z, head, targets, _ = make((2, 3, 8, 5), F32)
    z.requires_grad_()

    def loss(module, z: Tensor) -> Tensor:
        value, success = module.zero_shot_loss(z * 2, head, targets, 3.0)
        return (module.embedding_collapse(z.sin()).square() + value * (1 + success)).sum()

    from pydetox import ops

    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    ours, theirs = compiled(ops, z), loss(reference, z)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device: str) -> None:
    with FakeTensorMode():
        z = torch.empty(2, 3, 8, device=device, dtype=BF16)
        head = torch.empty(5, 8, device=device)
        targets = torch.empty(2, device=device, dtype=torch.int64)
        for found in (embedding_collapse(z), *zero_shot_loss(z, head, targets, 1.0)):
            assert found.shape == (2,)
            assert found.dtype == F32
            assert found.device.type == device


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_opcheck(dtype: torch.dtype, with_gradient: bool) -> None:
    z, head, targets, upstream = make((2, 3, 4, 5), dtype)
    operators = torch.ops.pydetox
    leaf = z.clone().requires_grad_(with_gradient)
    torch.library.opcheck(operators.embedding_collapse.default, (leaf,))
    torch.library.opcheck(
        operators.zero_shot_loss.default, (leaf, head, targets, 9.0, with_gradient)
    )
    upstream = upstream.to(dtype)
    torch.library.opcheck(operators.embedding_collapse_backward.default, (upstream, z))
    torch.library.opcheck(operators.zero_shot_loss_backward.default, (upstream, z, z))


def arguments(**changes: object) -> dict[str, object]:
    z, head, targets, _ = make((2, 3, 4, 5), F32)
    return {"z": z, "head": head, "targets": targets, "logit_scale": 1.0} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(3, 4)}, r"z must be \[K, B, D\], found \[3, 4\]"),
        ({"z": torch.zeros(2, 0, 4)}, r"at least 1 image, found \[2, 0, 4\]"),
        (
            {"z": torch.zeros(2, 3, 4, dtype=torch.int32)},
            r"z must be float32.*found int32",
        ),
        (
            {"head": torch.zeros(5, 3)},
            r"head must be \[C, 4\].*z \[2, 3, 4\], found \[5, 3\]",
        ),
        ({"head": torch.zeros(0, 4)}, r"C at least 1.*found \[0, 4\]"),
        ({"head": torch.zeros(5, 4).int()}, r"head must be float32 as z is, found int32"),
        ({"head": torch.zeros(5, 4, requires_grad=True)}, "head gets no gradient"),
        ({"targets": torch.zeros(3).long()}, r"int64 \[2\] for z \[2, 3, 4\], found .*\[3\]"),
        ({"targets": torch.zeros(2)}, r"int64 \[2\].*found float32"),
        ({"targets": torch.tensor([0, 5])}, "from 0 to 4, found 5"),
        ({"targets": torch.tensor([-1, 0])}, "from 0 to 4, found -1"),
        ({"logit_scale": 0.0}, "logit_scale must be a positive number, found 0"),
        ({"logit_scale": math.nan}, "logit_scale must be a positive number, found nan"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        zero_shot_loss(**arguments(**changes))


@pytest.mark.parametrize("count", [0, 1])
def test_a_pair_needs_two(count: int) -> None:
    with pytest.raises(UsageError, match=rf"at least 2 images.*found \[3, {count}, 4\]"):
        embedding_collapse(torch.zeros(3, count, 4))
    with pytest.raises(ValueError, match=rf"at least 2 images.*found \[3, {count}, 4\]"):
        torch.ops.pydetox.embedding_collapse(torch.zeros(3, count, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(3, 4)}, r"z must be \[K, B, D\], found \[3, 4\]"),
        ({"z": torch.zeros(2, 3, 4, dtype=BF16)}, "z must be float32 or float64, found bfloat16"),
        ({"z": torch.zeros(2, 0, 4)}, r"found \[2, 0, 4\]"),
        ({"head": torch.zeros(5, 3)}, r"for z \[2, 3, 4\], found \[5, 3\]"),
        ({"head": torch.zeros(5, 4).double()}, "head must be float32 as z is, found float64"),
        ({"targets": torch.zeros(1).long()}, r"int64 \[2\] for z \[2, 3, 4\], found int64 \[1\]"),
        ({"targets": torch.zeros(2).int()}, r"targets must be int64 \[2\].*found int32"),
        ({"logit_scale": -1.0}, "positive number, found -1"),
    ],
)
def test_the_operators_check_for_themselves(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.pydetox.zero_shot_loss(**arguments(**changes), with_gradient=True)


def test_the_backward_operators_check_for_themselves() -> None:
    z = torch.zeros(2, 3, 4)
    for gradient, message in (
        (torch.zeros(3), r"float32 \[2\] for z \[2, 3, 4\], found float32 \[3\]"),
        (torch.zeros(2).double(), r"float32 \[2\].*found float64 \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.pydetox.embedding_collapse_backward(gradient, z)
        with pytest.raises(ValueError, match=message):
            torch.ops.pydetox.zero_shot_loss_backward(gradient, z, z)
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] as z is, found float32 \[2, 3, 5\]"):
        torch.ops.pydetox.zero_shot_loss_backward(torch.zeros(2), z, torch.zeros(2, 3, 5))
