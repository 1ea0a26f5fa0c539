"""The update of triggers, against extended precision and against plain PyTorch."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pydetox.errors import UsageError
from pydetox.ops import BestTriggers, _library, reference, trigger_update

F32, F64 = torch.float32, torch.float64
Pair = tuple[Tensor, Tensor]
# K, C, H, W
SIZES = [
    (1, 1, 1, 1),
    (3, 3, 7, 5),
    (2, 2, 1, 9),
    (2, 1, 33, 1),
    (4, 3, 28, 28),
    (2, 3, 67, 71),  # more than one chunk, none of them whole rows
]


@dataclass(frozen=True)
class State:
    """Everything that an update takes."""

    logits: Pair
    gradients: Pair
    first: Pair
    second: Pair
    cost: Tensor
    learning_rate: Tensor
    steps: Tensor
    active: Tensor
    total_variation: Tensor | None
    best: BestTriggers | None
    betas: tuple[float, float] = (0.5, 0.9)
    epsilon: float = 1e-8

    def update(self, operator) -> list[Tensor]:
        """The norms, and all that may have changed; the state itself stays as it is."""
        copy = self.to(self.logits[0].dtype)
        norms = operator(
            copy.logits,
            copy.gradients,
            copy.first,
            copy.second,
            cost=copy.cost,
            learning_rate=copy.learning_rate,
            steps=copy.steps,
            active=copy.active,
            betas=copy.betas,
            epsilon=copy.epsilon,
            total_variation=copy.total_variation,
            best=copy.best,
        )
        return [norms, *copy.written()]

    def written(self) -> list[Tensor]:
        kept = [] if self.best is None else [*self.best.logits, self.best.norm]
        return [*self.logits, *self.first, *self.second, self.steps, *kept]

    def to(self, dtype: torch.dtype) -> "State":
        def pair(tensors: Pair) -> Pair:
            return tensors[0].to(dtype, copy=True), tensors[1].to(dtype, copy=True)

        best = self.best and BestTriggers(
            pair(self.best.logits), self.best.norm.clone(), self.best.eligible
        )
        return replace(
            self,
            logits=pair(self.logits),
            gradients=pair(self.gradients),
            first=pair(self.first),
            second=pair(self.second),
            steps=self.steps.clone(),
            best=best,
        )


def make(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = F32,
    *,
    variation: bool = True,
    best: bool = True,
    vectors: torch.dtype = F32,
    seed: int = 0,
) -> State:
    """A state in the middle of a search: every other trigger is active, moments are not zero."""
    triggers, channels, height, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def pair(scale: float = 1.0, square: bool = False) -> Pair:
        found = []
        for shape in ((triggers, height, width), (triggers, channels, height, width)):
            value = scale * torch.randn(shape, dtype=F64, generator=generator)
            # Second moments away from zero, as after some steps: dividing by them is well behaved.
            found.append((value.square() + 0.5 if square else value).to(dtype))
        return found[0], found[1]

    def vector(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, triggers, dtype=F64).to(vectors)

    number = torch.arange(triggers)
    kept = BestTriggers(
        pair(),
        torch.where(number % 4 == 0, math.inf, 0.1).double(),
        number % 4 != 3,
    )
    return State(
        logits=pair(),
        gradients=pair(0.3),
        first=pair(0.2),
        second=pair(0.5, square=True),
        cost=vector(0.01, 0.5),
        learning_rate=vector(0.5, 0.05),
        steps=3 * number,
        active=number % 2 == 0,
        total_variation=vector(0.02, 0.2) if variation else None,
        best=kept if best else None,
    )


def exact(state: State) -> list[np.ndarray]:
    """What `State.update` returns, by the formulas in extended precision, without torch."""

    def wide(t: Tensor) -> np.ndarray:
        return t.double().numpy().astype(np.longdouble)

    logits, gradients, first, second = (
        [wide(t) for t in pair]
        for pair in (state.logits, state.gradients, state.first, state.second)
    )
    active = state.active.numpy()
    mask = np.tanh(logits[0]) / 2 + 0.5
    weight = np.zeros_like(mask) + wide(state.cost)[:, None, None]
    if state.total_variation is not None:
        signs = np.zeros_like(mask)
        for axis in (1, 2):
            down = np.sign(np.diff(logits[0], axis=axis))
            pad = [(0, 0)] * 3
            pad[axis] = (1, 0)
            signs += np.pad(down, pad)
            pad[axis] = (0, 1)
            signs -= np.pad(down, pad)
        weight += wide(state.total_variation)[:, None, None] * signs
    norms = mask.sum((1, 2))
    gradients[0] += (1 - np.tanh(logits[0]) ** 2) / 2 * weight
    beta1, beta2 = map(np.longdouble, state.betas)
    taken = state.steps.numpy() + 1
    rate = wide(state.learning_rate) / (1 - beta1**taken)
    correction = np.sqrt(1 - beta2**taken)
    results: list[list[np.ndarray]] = [[], [], []]
    for w, g, m, v in zip(logits, gradients, first, second, strict=True):
        each = (-1, *(1,) * (w.ndim - 1))
        moved = beta1 * m + (1 - beta1) * g
        spread = beta2 * v + (1 - beta2) * g**2
        step = rate.reshape(each) * moved
        step = step / (np.sqrt(spread) / correction.reshape(each) + state.epsilon)
        for found, after, before in zip(results, (w - step, moved, spread), (w, m, v), strict=True):
            found.append(np.where(active.reshape(each), after, before))
    written = [*results[0], *results[1], *results[2], state.steps.numpy() + active]
    if state.best is not None:
        better = active & state.best.eligible.numpy() & (norms < state.best.norm.numpy())
        for kept, now in zip(state.best.logits, logits, strict=True):
            written.append(np.where(better.reshape((-1, *(1,) * (now.ndim - 1))), now, wide(kept)))
        written.append(np.where(better, norms, wide(state.best.norm)))
    return [np.where(active, norms, np.nan), *written]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("variation", [False, True])
def test_update(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, variation: bool, capability: str
) -> None:
    state = make(sizes, dtype, variation=variation)
    truth = exact(state)
    ours, plain = state.update(trigger_update), state.update(reference.trigger_update)
    for found, theirs, expected in zip(ours, plain, truth, strict=True):
        assert found.dtype == theirs.dtype
        np.testing.assert_array_equal(np.isnan(found.numpy()), np.isnan(expected))
        error, allowed = (
            np.nanmax(np.abs(t.double().numpy() - expected), initial=0) for t in (found, theirs)
        )
        largest = np.nanmax(np.abs(np.where(np.isinf(expected), 0, expected)), initial=1)
        assert (
            np.nan_to_num(error)
            <= 2 * np.nan_to_num(allowed) + 4 * torch.finfo(dtype).eps * largest
        )
    # Kept triggers are copies, bit for bit.
    assert state.best is not None
    assert torch.equal(ours[8][0], state.logits[0][0])
    assert torch.equal(ours[9][0], state.logits[1][0])


def test_a_search_is_that_of_torch() -> None:
    """Many steps of one trigger, with autograd computing the gradient of the penalties."""
    sizes = (1, 2, 5, 4)
    state = make(sizes, F64, best=False)
    zeros = (torch.zeros_like(state.logits[0]), torch.zeros_like(state.logits[1]))
    first, second = (tuple(map(torch.clone, zeros)) for _ in range(2))
    logits = tuple(map(torch.clone, state.logits))
    leaves = [t.clone().requires_grad_() for t in state.logits]
    rate, cost, weight = 0.1, 0.02, 0.01
    optimizer = torch.optim.Adam(leaves, lr=rate, betas=state.betas)
    steps = torch.zeros(1, dtype=torch.int64)
    for _ in range(60):
        norms = trigger_update(
            logits,
            state.gradients,
            first,
            second,
            cost=torch.tensor([cost], dtype=F64),
            learning_rate=torch.tensor([rate], dtype=F64),
            total_variation=torch.tensor([weight], dtype=F64),
            steps=steps,
            active=torch.tensor([True]),
            betas=state.betas,
        )
        optimizer.zero_grad()
        mask = torch.tanh(leaves[0]) / 2 + 0.5
        torch.testing.assert_close(norms, mask.sum(dim=(1, 2)).detach())
        variation = mask.diff(dim=1).abs().sum() + mask.diff(dim=2).abs().sum()
        loss = cost * mask.sum() + weight * variation
        loss = loss + sum((a * b).sum() for a, b in zip(leaves, state.gradients, strict=True))
        loss.backward()
        optimizer.step()
    for found, leaf in zip(logits, leaves, strict=True):
        torch.testing.assert_close(found, leaf.detach(), rtol=1e-9, atol=1e-9)
    assert steps.item() == 60


@pytest.mark.parametrize("variation", [False, True])
def test_bits_depend_on_neither_threads_nor_instruction_set(
    variation: bool, capability: str, threads: None
) -> None:
    for dtype in (F32, F64):
        state = make((5, 3, 67, 71), dtype, variation=variation)
        results = []
        for count, name in ((2, capability), (1, capability), (1, "scalar")):
            torch.set_num_threads(count)
            _library.native.set_cpu_capability(name)
            results.append(state.update(trigger_update))
        assert same(results[0], results[1])
        assert same(results[0], results[2])


def test_what_is_not_active_is_not_touched(capability: str) -> None:
    """Not even looked at: its memory holds NaN, and other triggers' results do not change."""
    state = make((4, 3, 9, 11))
    expected = state.update(trigger_update)
    assert state.best is not None
    for tensors in (state.logits, state.gradients, state.first, state.second, state.best.logits):
        for tensor in tensors:
            tensor[~state.active] = math.nan
    found = state.update(trigger_update)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[state.active], b[state.active])
    for before, after in zip(state.written(), found[1:], strict=True):
        still = after[~state.active].nan_to_num(nan=5.0)
        assert torch.equal(still, before[~state.active].nan_to_num(nan=5.0))
    assert found[0].isnan().equal(~state.active)


def test_layout_and_dtypes_of_vectors_do_not_matter(capability: str) -> None:
    state = make((3, 2, 7, 5))
    expected = state.update(trigger_update)
    assert same(replace_vectors(state, F64).update(trigger_update), expected)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], dim=-1)[..., 0]

    gradients = strided(state.gradients[0]), strided(state.gradients[1])
    copy = state.to(F32)
    norms = trigger_update(
        copy.logits,
        gradients,
        copy.first,
        copy.second,
        cost=copy.cost,
        learning_rate=copy.learning_rate,
        steps=copy.steps,
        active=copy.active,
        betas=copy.betas,
        total_variation=copy.total_variation,
        best=copy.best,
    )
    assert same([norms, *copy.written()], expected)

    def shifted(pair: Pair) -> Pair:
        moved = [torch.zeros(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in pair]
        return moved[0], moved[1]

    class Shifted(State):
        def to(self, dtype: torch.dtype) -> State:
            copy = super().to(dtype)
            return replace(
                copy,
                logits=shifted(copy.logits),
                gradients=shifted(copy.gradients),
                first=shifted(copy.first),
                second=shifted(copy.second),
            )

    assert same(Shifted(**vars(state)).update(trigger_update), expected)


def replace_vectors(state: State, dtype: torch.dtype) -> State:
    assert state.total_variation is not None
    return replace(
        state,
        cost=state.cost.to(dtype),
        learning_rate=state.learning_rate.to(dtype),
        total_variation=state.total_variation.to(dtype),
    )


def test_equal_neighbours_have_no_variation() -> None:
    state = make((1, 1, 6, 5), F64)
    flat = (torch.full_like(state.logits[0], 0.3), state.logits[1])
    with_variation = replace(state, logits=flat)
    without = replace(with_variation, total_variation=None)
    assert same(with_variation.update(trigger_update), without.update(trigger_update))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_where_arithmetic_sends_it(value: float, capability: str) -> None:
    state = make((2, 2, 6, 7), F64)
    state.logits[0][0, 3, 4] = value
    state.gradients[1][0, 1, 2, 2] = value
    ours, plain = state.update(trigger_update), state.update(reference.trigger_update)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert ours[0].isnan().tolist() == [math.isnan(value), True]  # the second rests
    assert (~ours[2][0].isfinite()).nonzero().tolist() == [[1, 2, 2]]


def test_the_best_is_kept_where_it_is_eligible_and_smaller(capability: str) -> None:
    state = make((5, 1, 4, 4), F64)
    assert state.best is not None
    norms = (torch.tanh(state.logits[0]) / 2 + 0.5).sum(dim=(1, 2))
    limits = torch.stack([norms[0] + 1, norms[1] - 1, norms[2] + 1, norms[3] + 1, norms[4] - 1])
    state.best.norm.copy_(limits)
    eligible = torch.tensor([True, True, False, True, True])
    active = torch.tensor([True, True, True, False, True])
    state = replace(state, active=active, best=state.best._replace(eligible=eligible))
    found = state.update(trigger_update)
    assert state.best is not None
    for after, before, now in zip(found[8:10], state.best.logits, state.logits, strict=True):
        assert torch.equal(after[0], now[0])
        assert torch.equal(after[1:], before[1:])
    torch.testing.assert_close(found[10], torch.cat([norms[:1], limits[1:]]))


@pytest.mark.parametrize("sizes", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int, int], capability: str) -> None:
    state = make(sizes)
    ours, plain = state.update(trigger_update), state.update(reference.trigger_update)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_fake_tensors_and_compile() -> None:
    with FakeTensorMode():
        state = make((2, 3, 4, 5))
        (norms, *_) = state.update(trigger_update)
        assert norms.shape == (2,)
        assert norms.dtype == F64
    state = make((2, 3, 4, 5))
    torch.compiler.reset()

    def step(w: Tensor, p: Tensor, *others: Tensor) -> Tensor:
        norms = trigger_update(
            (w, p),
            (others[0], others[1]),
            (others[2], others[3]),
            (others[4], others[5]),
            cost=others[6],
            learning_rate=others[7],
            steps=others[8],
            active=others[9],
            betas=(0.5, 0.9),
        )
        return norms + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        copy = state.to(F32)
        pairs = (*copy.logits, *copy.gradients, *copy.first, *copy.second)
        vectors = (copy.cost, copy.learning_rate, copy.steps, copy.active)
        results.append([function(*pairs, *vectors), *pairs, copy.steps])
    assert same(*results)


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional: bool) -> None:
    state = make((2, 3, 4, 5), variation=optional, best=optional).to(F32)
    state.active[:] = True  # it takes NaN for a difference
    best = (None,) * 4
    if state.best is not None:
        best = (*state.best.logits, state.best.norm, state.best.eligible)
    torch.library.opcheck(
        torch.ops.pydetox.trigger_update.default,
        (
            *(t for pair in (state.logits, state.gradients) for t in pair),
            *(t for pair in (state.first, state.second) for t in pair),
            state.cost,
            state.learning_rate,
            state.total_variation,
            state.steps,
            state.active,
            *best,
            0.5,
            0.9,
            1e-8,
        ),
    )


def changed(pair: Pair, which: int, tensor: Tensor) -> Pair:
    return (tensor, pair[1]) if which == 0 else (pair[0], tensor)


WRONG = [
    (lambda s: {"logits": changed(s.logits, 0, torch.zeros(4, 5))}, r"\[K, H, W\], found \[4, 5\]"),
    (
        lambda s: {"logits": changed(s.logits, 1, torch.zeros(2, 3, 5, 4))},
        r"\[2, C, 4, 5\] for mask_logits \[2, 4, 5\], found float32 \[2, 3, 5, 4\]",
    ),
    (
        lambda s: {"logits": (s.logits[0].half(), s.logits[1].half())},
        "float32 or float64, found float16",
    ),
    (
        lambda s: {"gradients": changed(s.gradients, 0, s.gradients[0].double())},
        r"mask_gradient must be float32 \[2, 4, 5\].*found float64",
    ),
    (
        lambda s: {"first": changed(s.first, 1, torch.zeros(2, 3, 4, 4))},
        r"pattern_first must be .*\[2, 3, 4, 5\].*found .*\[2, 3, 4, 4\]",
    ),
    (
        lambda s: {"second": changed(s.second, 0, torch.zeros(2, 5, 4).mT)},
        r"mask_second must be contiguous",
    ),
    (lambda s: {"cost": torch.zeros(3)}, r"cost must be float32 or float64 \[2\].*found .*\[3\]"),
    (lambda s: {"learning_rate": torch.zeros(2).long()}, "learning_rate must be.*found int64"),
    (lambda s: {"steps": torch.zeros(2)}, r"steps must be int64 \[2\].*found float32"),
    (lambda s: {"active": torch.zeros(2)}, r"active must be bool \[2\].*found float32"),
    (lambda s: {"cost": torch.zeros(4)[::2]}, r"cost must be contiguous"),
    (
        lambda s: {"best": s.best._replace(norm=torch.zeros(2))},
        r"best_norm must be float64 \[2\].*found float32",
    ),
    (lambda s: {"betas": (0.5, 1.0)}, r"betas must be in \[0, 1\), found 0.5 and 1"),
    (lambda s: {"epsilon": -1.0}, "epsilon must not be negative, found -1"),
    (lambda s: {"first": s.second}, "must not share memory with"),
    (lambda s: {"gradients": s.first}, "must not share memory with mask_gradient"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_arguments(change, message: str) -> None:
    state = make((2, 3, 4, 5))
    call = {name: getattr(state, name) for name in State.__dataclass_fields__} | change(state)
    with pytest.raises(UsageError, match=message):
        trigger_update(
            call.pop("logits"), call.pop("gradients"), call.pop("first"), call.pop("second"), **call
        )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("mask_logits", torch.zeros(4, 5), r"mask_logits must be \[K, H, W\], found \[4, 5\]"),
        (
            "pattern_logits",
            torch.zeros(2, 3, 5, 4),
            r"mask_logits \[2, 4, 5\].*\[2, 3, 5, 4\]",
        ),
        (
            "mask_gradient",
            torch.zeros(2, 4, 4),
            r"mask_gradient must be .*\[2, 4, 5\].*\[2, 4, 4\]",
        ),
        (
            "pattern_second",
            torch.zeros(2, 3, 4, 5).double(),
            "second must be float32 .*float64",
        ),
        (
            "cost",
            torch.zeros(3),
            r"cost must be .*\[2\].*found float32 \[3\]",
        ),
        ("learning_rate", torch.zeros(2).long(), "learning_rate must be float32 or float64"),
        ("steps", torch.zeros(2), "steps must be int64"),
        ("active", torch.zeros(2), "active must be bool"),
        ("mask_first", torch.zeros(2, 5, 4).mT, "mask_first must be contiguous"),
        ("eligible", torch.zeros(2).bool(), "come together"),
        ("beta1", 1.5, r"betas must be in \[0, 1\), found 1.5"),
        ("epsilon", -1.0, "epsilon must not be negative"),
    ],
)
def test_the_operator_checks_for_itself(name: str, tensor: object, message: str) -> None:
    state = make((2, 3, 4, 5), variation=False, best=False)
    pairs = {
        f"{part}_{what}": tensor
        for what in ("logits", "gradients", "first", "second")
        for part, tensor in zip(("mask", "pattern"), getattr(state, what), strict=True)
    }
    call = {key.replace("gradients", "gradient"): tensor for key, tensor in pairs.items()}
    call |= {key: getattr(state, key) for key in ("cost", "learning_rate", "steps", "active")}
    call |= dict.fromkeys(("total_variation", "best_mask", "best_pattern", "best_norm", "eligible"))
    call |= {"beta1": 0.5, "beta2": 0.9, "epsilon": 1e-8}
    with pytest.raises(ValueError, match=message):
        torch.ops.pydetox.trigger_update(**(call | {name: tensor}))
