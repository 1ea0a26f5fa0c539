"""mix_tokens, its update and top_swaps, against float64 and against plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pydetox import ops
from pydetox.errors import UsageError
from pydetox.ops import (
    TokenMixture,
    _library,
    mix_tokens,
    mix_tokens_forward,
    mix_tokens_update,
    reference,
    top_swaps,
)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
#: Rows, tokens, dimensions.
SIZES = [
    (1, 1, 1),
    (3, 7, 5),
    (2, 64, 16),
    (5, 300, 33),  # two parts of the table, neither a whole number of runs of dimensions
    (17, 129, 70),
    (131, 90, 20),  # more rows than exist at the same time
]
DTYPES = [(F32, F32), (F32, BF16), (F64, F64)]


class Problem:
    """Logits, a table and an upstream gradient."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
        masked: bool = False,
        temperature: float | Tensor = 0.7,
    ) -> None:
        rows, tokens, dim = sizes
        generator = torch.Generator().manual_seed(rows * 1000 + tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=F64, generator=generator)

        self.logits = (3 * normal(rows, tokens)).to(dtypes[0])
        self.table = normal(tokens, dim).to(dtypes[1])
        self.gradient = normal(rows, dim).to(dtypes[0])
        self.current = torch.randint(0, tokens, (rows,), generator=generator)
        self.allowed: Tensor | None = None
        if masked:
            self.allowed = torch.rand(tokens, generator=generator) < 0.6
            self.allowed[tokens // 2] = True
        self.temperature = temperature

    def mix(self, module: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The mixed embeddings and the gradient of the logits."""
        leaf = self.logits.to(dtype or self.logits.dtype).clone().requires_grad_()
        table = self.table if dtype is None else self.table.to(dtype)
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(leaf.dtype)
        mixed = module.mix_tokens(leaf, table, temperature, self.allowed)
        (gradient,) = torch.autograd.grad(mixed, leaf, self.gradient.to(mixed.dtype))
        return mixed.detach(), gradient

    def swaps(self, k: int) -> tuple[Tensor, Tensor]:
        return top_swaps(self.gradient, self.table, self.current, self.allowed, k)

    def step(self, module: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Logits, moments and steps after a step of Adam."""
        kind = dtype or self.logits.dtype
        table = self.table if dtype is None else self.table.to(dtype)
        rows = len(self.logits)
        logits = self.logits.to(kind, copy=True)
        first, second = torch.full_like(logits, 0.1), torch.ones_like(logits)
        steps = torch.arange(rows)
        mixture = TokenMixture(
            *module.mix_tokens_forward(logits, table, self.temperature, self.allowed)
        )
        module.mix_tokens_update(
            self.gradient.to(kind),
            mixture,
            logits,
            first,
            second,
            table,
            self.temperature,
            self.allowed,
            learning_rate=torch.linspace(0.1, 0.3, rows),
            steps=steps,
            active=torch.arange(rows) % 3 != 1,
            betas=(0.5, 0.9),
        )
        return [logits, first, second, steps]


def check_close(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain PyTorch, and a few roundings of the largest value."""
    few = 64 if ours.dtype == F64 else 4  # the truth in float64 is rounded as often as ours is
    slack = few * torch.finfo(ours.dtype).eps * max(1.0, float(truth.abs().max()))
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + slack


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_float64(
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    masked: bool,
) -> None:
    p = Problem(sizes, dtypes, masked)
    for ours, plain, truth in zip(p.mix(ops), p.mix(reference), p.mix(reference, F64), strict=True):
        check_close(ours, plain, truth)
    for ours, plain, truth in zip(
        p.step(ops), p.step(reference), p.step(reference, F64), strict=True
    ):
        if ours.is_floating_point():
            check_close(ours, plain, truth)
        else:
            assert torch.equal(ours, truth)
    k = min(5, sizes[1])
    scores, tokens = p.swaps(k)
    wide = (p.gradient.double(), p.table.double(), p.current, p.allowed, k)
    truth_scores, truth_tokens = reference.top_swaps(*wide)
    torch.testing.assert_close(scores.double(), truth_scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, truth_tokens)


def test_one_temperature_for_each_row() -> None:
    p = Problem((3, 70, 9), temperature=torch.tensor([0.5, 1.0, 2.0]))
    ours, theirs = p.mix(ops), p.mix(reference)
    torch.testing.assert_close(ours, theirs)
    same = Problem((3, 70, 9), temperature=1.0).mix(ops)
    assert torch.equal(ours[0][1], same[0][1])


@pytest.mark.parametrize("masked", [False, True])
def test_the_vocabulary_of_bert(masked: bool) -> None:
    p = Problem((2, 30522, 8), masked=masked)
    for ours, plain, truth in zip(p.mix(ops), p.mix(reference), p.mix(reference, F64), strict=True):
        check_close(ours, plain, truth)
    assert torch.equal(
        p.swaps(50)[1],
        reference.top_swaps(p.gradient, p.table, p.current, p.allowed, 50)[1],
    )


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_same_bits_for_threads_instruction_sets_and_other_rows(
    threads: None, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    p = Problem((35, 700, 81), dtypes, masked=True)
    before = _library.native.cpu_capability()
    expected: list[Tensor] | None = None
    for capability in _library.native.supported_cpu_capabilities():
        for count in (1, 2, 3):
            _library.native.set_cpu_capability(capability)
            torch.set_num_threads(count)
            found = [*p.mix(ops), *p.step(ops), *p.swaps(40)]
            expected = expected or found
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    _library.native.set_cpu_capability(before)
    alone = mix_tokens(p.logits[7:8], p.table, 0.7, p.allowed)
    assert torch.equal(alone[0], expected[0][7])


def test_the_update_is_adam_on_the_gradient() -> None:
    """The fused step has the gradient's bits: Adam in the first step moves by its sign."""
    p = Problem((4, 150, 12), masked=True)
    _, gradient = p.mix(ops)
    logits = p.logits.clone()
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    mixture = mix_tokens_forward(logits, p.table, 0.7, p.allowed)
    everyone = torch.ones(4, dtype=torch.bool)
    steps = torch.zeros(4, dtype=torch.int64)
    mix_tokens_update(
        p.gradient,
        mixture,
        logits,
        first,
        second,
        p.table,
        0.7,
        p.allowed,
        learning_rate=torch.full((4,), 0.5),
        steps=steps,
        active=everyone,
        betas=(0.0, 0.0),
        epsilon=0.0,
    )
    assert torch.equal(first, gradient)
    assert torch.equal(second, gradient.square())
    large = gradient.abs() > 1e-18  # whose square is a normal number
    torch.testing.assert_close((logits - p.logits)[large], -0.5 * gradient.sign()[large])
    assert torch.equal(logits[:, ~p.allowed], p.logits[:, ~p.allowed])
    assert steps.tolist() == [1] * 4


def test_rows_that_rest_and_tokens_that_are_not_allowed_are_not_touched() -> None:
    p = Problem((4, 100, 6), masked=True)
    p.logits[1] = math.nan
    p.logits[:, ~p.allowed] = math.nan
    p.table[~p.allowed] = math.nan
    logits, first, second, steps = p.step(ops)
    assert logits[1].isnan().all()
    assert (first[1] == 0.1).all()
    assert steps.tolist() == [1, 1, 3, 4]
    assert logits[0, p.allowed].isfinite().all()
    assert logits[0, ~p.allowed].isnan().all()
    assert (second[0, ~p.allowed] == 1).all()
    mixed, gradient = p.mix(ops)
    assert mixed[0].isfinite().all()
    assert (gradient[0, ~p.allowed] == 0).all()


# ---- special values -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_extreme_logits(capability: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    p = Problem((4, 600, 9), dtypes)
    p.logits[0] *= 1e4
    p.logits[1] = -1e4
    p.logits[2] = 1e4
    p.logits[3, ::2] = -math.inf
    for ours, plain, truth in zip(p.mix(ops), p.mix(reference), p.mix(reference, F64), strict=True):
        assert ours.isfinite().all()
        check_close(ours, plain, truth)


def test_one_allowed_token_is_taken_whole() -> None:
    p = Problem((3, 333, 8), (F32, BF16))
    p.allowed = torch.arange(333) == 257
    mixed, gradient = p.mix(ops)
    assert torch.equal(mixed, p.table[257].float().expand(3, 8))
    assert gradient.abs().max() < 1e-5
    scores, tokens = p.swaps(3)
    assert tokens.tolist() == [[257, -1, -1]] * 3
    assert (scores[:, 1:] == math.inf).all()


def test_rows_without_a_distribution_are_nan() -> None:
    p = Problem((5, 300, 4))
    p.logits[0] = -math.inf
    p.logits[1, 299] = math.nan
    p.logits[2, 0] = math.inf
    p.logits[3, :256] = -math.inf  # a whole part of the table
    mixed, _ = p.mix(ops)
    assert mixed.isnan().all(dim=1).tolist() == [True, True, True, False, False]
    torch.testing.assert_close(mixed[3:], p.mix(reference)[0][3:])
    nobody = mix_tokens(p.logits, p.table, 1.0, torch.zeros(300, dtype=torch.bool))
    assert nobody.isnan().all()


def test_equal_scores_go_by_the_smaller_token(capability: str) -> None:
    table = torch.tensor([1.0, 0.0, -1.0]).repeat(100)[:, None]
    gradient = torch.tensor([[1.0], [-1.0], [0.0]])
    current = torch.tensor([0, 1, 2])
    scores, tokens = top_swaps(gradient, table, current, None, 4)
    assert tokens.tolist() == [[2, 5, 8, 11], [0, 3, 6, 9], [0, 1, 2, 3]]
    assert scores.tolist() == [[-2.0] * 4, [-1.0] * 4, [0.0] * 4]


def test_scores_that_are_not_numbers_come_last() -> None:
    table = torch.tensor([[0.0], [math.nan], [1.0], [math.inf], [-math.inf]])
    scores, tokens = top_swaps(torch.ones(1, 1), table, torch.tensor([0]), None, 5)
    assert tokens.tolist() == [[4, 0, 2, 3, 1]]
    assert scores[0, :4].tolist() == [-math.inf, 0.0, 1.0, math.inf]
    assert scores[0, 4].isnan()


def test_no_rows() -> None:
    p = Problem((0, 10, 4))
    mixed, gradient = p.mix(ops)
    assert mixed.shape == (0, 4)
    assert gradient.shape == (0, 10)
    assert p.step(ops)[0].shape == (0, 10)
    assert p.swaps(3)[1].shape == (0, 3)


def test_strided_tensors() -> None:
    p = Problem((6, 90, 10), masked=True)
    expected = p.mix(ops), p.swaps(4)
    p.logits = p.logits.T.contiguous().T
    p.table = p.table.T.contiguous().T
    p.gradient = p.gradient.repeat(1, 2)[:, :10]
    p.allowed = p.allowed.repeat_interleave(2)[::2]
    for ours, theirs in zip((p.mix(ops), p.swaps(4)), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- as an operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    p = Problem((3, 70, 5), (F64, F64), masked)
    leaf = (p.logits / 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mix_tokens(x, p.table, 0.8, p.allowed), leaf)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    p = Problem((3, 70, 5), dtypes, masked=True)
    operators = torch.ops.pydetox
    temperature = torch.full((3,), 0.7, dtype=dtypes[0])
    arguments = (p.table, temperature, p.allowed)
    torch.library.opcheck(
        operators.mix_tokens.default, (p.logits.clone().requires_grad_(), *arguments)
    )
    mixture = mix_tokens_forward(p.logits, p.table, 0.7, p.allowed)
    given = (p.gradient, *mixture)
    torch.library.opcheck(operators.mix_tokens_backward.default, (*given, p.logits, *arguments))
    state = (p.logits, torch.zeros_like(p.logits), torch.zeros_like(p.logits))
    rest = (torch.ones(3), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
    torch.library.opcheck(
        operators.mix_tokens_update.default, (*given, *state, *arguments, *rest, 0.5, 0.9, 1e-8)
    )
    torch.library.opcheck(
        operators.top_swaps.default, (p.gradient, p.table, p.current, p.allowed, 4)
    )


def test_fake_tensors() -> None:
    with FakeTensorMode():
        logits = torch.empty(3, 70, requires_grad=True, device="cuda")
        table = torch.empty(70, 5, dtype=BF16, device="cuda")
        mixed = mix_tokens(logits, table, 0.5)
        assert (mixed.shape, mixed.dtype, mixed.device.type) == ((3, 5), F32, "cuda")
        scores, tokens = top_swaps(mixed, table, torch.zeros(3, dtype=torch.int64), None, 4)
        assert (scores.shape, tokens.shape, tokens.dtype) == ((3, 4), (3, 4), torch.int64)


def test_compile_does_not_break_the_graph() -> None:
    p = Problem((3, 70, 5))
    leaf = p.logits.requires_grad_()

    def loss(module: Any, logits: Tensor) -> Tensor:
        return module.mix_tokens(logits * 2, p.table, 0.7).sin().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(ops, leaf), leaf)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(reference, leaf), leaf))


def test_double_backward_is_refused_by_name() -> None:
    p = Problem((2, 9, 3))
    leaf = p.logits.requires_grad_()
    (gradient,) = torch.autograd.grad(mix_tokens(leaf, p.table, 1.0).sum(), leaf, create_graph=True)
    with pytest.raises(UsageError, match="mix_tokens cannot be differentiated twice"):
        gradient.sum().backward()


# ---- wrong arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3, 8)}, r"logits must be \[R, 9\] for table \[9, 4\], found"),
        ({"logits": torch.zeros(9)}, r"logits must be \[R, 9\].*found \[9\]"),
        ({"logits": torch.zeros(3, 9, dtype=BF16)}, "logits must be float32 or float64"),
        ({"table": torch.zeros(9, 4, dtype=F64)}, "float32 or bfloat16 for logits of float32"),
        ({"table": torch.zeros(0, 4)}, "at least one token and one dimension, found"),
        ({"table": torch.zeros(9)}, r"table must be \[V, d\]"),
        ({"allowed": torch.ones(8, dtype=torch.bool)}, r"allowed must be bool \[9\]"),
        ({"allowed": torch.ones(9)}, r"allowed must be bool \[9\].*found float32 \[9\]"),
        ({"temperature": 0.0}, "temperature must be a positive number, found 0.0"),
        ({"temperature": math.nan}, "temperature must be a positive number, found nan"),
        ({"temperature": torch.ones(2)}, r"temperature must be float32 \[3\], one for each row"),
        ({"temperature": torch.ones(3, dtype=F64)}, r"float32 \[3\].*found float64 \[3\]"),
        ({"table": torch.zeros(9, 4, requires_grad=True)}, "table gets no gradient"),
    ],
)
def test_wrong_arguments_of_mixing(changes: dict[str, Any], message: str) -> None:
    given = {"logits": torch.zeros(3, 9), "table": torch.zeros(9, 4), "temperature": 1.0}
    with pytest.raises(UsageError, match=message):
        mix_tokens(**(given | changes))


def update_arguments() -> dict[str, Any]:
    logits = torch.zeros(3, 9)
    return {
        "gradient": torch.zeros(3, 4),
        "mixture": TokenMixture(torch.zeros(3, 4), torch.ones(3, 2)),
        "logits": logits,
        "first": torch.zeros(3, 9),
        "second": torch.zeros(3, 9),
        "table": torch.zeros(9, 4),
        "temperature": 1.0,
        "learning_rate": torch.ones(3),
        "steps": torch.zeros(3, dtype=torch.int64),
        "active": torch.ones(3, dtype=torch.bool),
        "betas": (0.9, 0.99),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": torch.zeros(3, 5)}, r"gradient must be float32 \[3, 4\] for logits"),
        ({"first": torch.zeros(3, 8)}, r"first must be float32 \[3, 9\]"),
        ({"second": torch.zeros(3, 9, dtype=F64)}, r"second must be float32 \[3, 9\].*float64"),
        ({"learning_rate": torch.ones(2)}, r"learning_rate must be float32 or float64 \[3\]"),
        ({"steps": torch.zeros(3)}, r"steps must be int64 \[3\].*found float32"),
        ({"active": torch.ones(3)}, r"active must be bool \[3\]"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\), found 1 and 0.9"),
        ({"epsilon": -1.0}, "epsilon must not be negative, found -1"),
        ({"logits": torch.zeros(9, 3).T}, "logits must be contiguous"),
        (
            {"mixture": TokenMixture(torch.zeros(3, 4), torch.ones(3))},
            r"softmax must be .*\[3, 2\]",
        ),
    ],
)
def test_wrong_arguments_of_the_update(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mix_tokens_update(**(update_arguments() | changes))


def test_shared_memory_is_refused() -> None:
    arguments = update_arguments()
    arguments["second"] = arguments["first"]
    with pytest.raises(UsageError, match="first must not share memory with second"):
        mix_tokens_update(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": torch.zeros(3, 5)}, r"gradient must be \[R, 4\] for table \[9, 4\]"),
        ({"gradient": torch.zeros(3, 4, dtype=BF16)}, "gradient must be float32 or float64"),
        ({"current": torch.zeros(2, dtype=torch.int64)}, r"current must be int64 \[3\]"),
        ({"current": torch.zeros(3)}, r"current must be int64 \[3\].*found float32"),
        ({"current": torch.tensor([0, 9, 1])}, "current must be from 0 to 8, found 9"),
        ({"current": torch.tensor([0, -1, 1])}, "current must be from 0 to 8, found -1"),
        ({"k": 0}, "k must be from 1 to 9 .*found 0"),
        ({"k": 10}, "k must be from 1 to 9 .*found 10"),
    ],
)
def test_wrong_arguments_of_swaps(changes: dict[str, Any], message: str) -> None:
    given = {
        "gradient": torch.zeros(3, 4),
        "table": torch.zeros(9, 4),
        "current": torch.zeros(3, dtype=torch.int64),
        "allowed": None,
        "k": 2,
    }
    with pytest.raises(UsageError, match=message):
        top_swaps(**(given | changes))
