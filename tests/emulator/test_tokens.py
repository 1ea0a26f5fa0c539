"""The CUDA kernels of mix_tokens, its update and top_swaps, run from their .cuh by the emulator.

They must give the CPU's bits, whatever the schedule is.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pydetox import _emulator, ops

Schedule = _emulator.Schedule
Traffic = list[_emulator.Traffic]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Problem:
    def __init__(
        self,
        sizes: tuple[int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
        masked: bool = True,
    ) -> None:
        rows, tokens, dim = sizes
        generator = torch.Generator().manual_seed(rows + tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=F64, generator=generator)

        self.logits = (3 * normal(rows, tokens)).to(dtypes[0])
        self.table = normal(tokens, dim).to(dtypes[1])
        self.gradient = normal(rows, dim).to(dtypes[0])
        self.current = torch.randint(0, tokens, (rows,), generator=generator)
        self.temperature = torch.linspace(0.5, 1.5, rows).to(dtypes[0])
        self.allowed = torch.rand(tokens, generator=generator) < 0.6 if masked else None
        if self.allowed is not None:
            self.allowed[0] = True

    def mixture(self) -> ops.TokenMixture:
        return ops.mix_tokens_forward(self.logits, self.table, self.temperature, self.allowed)

    def mixing(self) -> tuple[object, ...]:
        return self.logits, self.table, self.temperature, self.allowed

    def backward(self) -> tuple[object, ...]:
        return self.gradient, *self.mixture(), *self.mixing()

    def state(self) -> tuple[Tensor, ...]:
        """Logits, moments and steps, as they are before an update."""
        logits = self.logits.clone()
        steps = torch.arange(len(logits))
        return logits, torch.full_like(logits, 0.1), torch.ones_like(logits), steps

    def update(self, state: tuple[Tensor, ...]) -> tuple[object, ...]:
        rows = len(self.logits)
        return (
            *(self.gradient, *self.mixture(), *state[:3]),
            *(self.table, self.temperature, self.allowed),
            *(torch.linspace(0.1, 0.2, rows).double(), state[3], torch.arange(rows) % 3 != 1),
            *(0.5, 0.9, 1e-8),
        )


def run(p: Problem, k: int, schedule: Schedule) -> tuple[list[Tensor], Traffic]:
    """All results of the emulator, and its launches."""
    mixed, first = _emulator.run("mix_tokens", *p.mixing(), schedule=schedule)
    gradient, second = _emulator.run("mix_tokens_backward", *p.backward(), schedule=schedule)
    state = p.state()
    _, third = _emulator.run("mix_tokens_update", *p.update(state), schedule=schedule)
    arguments = (p.gradient, p.table, p.current, p.allowed, k)
    swaps, fourth = _emulator.run("top_swaps", *arguments, schedule=schedule)
    return [*mixed, gradient, *state, *swaps], [*first, *second, *third, *fourth]


def on_the_cpu(p: Problem, k: int) -> list[Tensor]:
    state = p.state()
    gradient = torch.ops.pydetox.mix_tokens_backward(*p.backward())
    torch.ops.pydetox.mix_tokens_update(*p.update(state))
    swaps = ops.top_swaps(p.gradient, p.table, p.current, p.allowed, k)
    return [*p.mixture(), gradient, *state, *swaps]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F64)], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1),
        (3, 131, 70),  # two runs of dimensions, single elements
        (2, 300, 16),  # two parts, and rows of whole words
    ],
    ids=str,
)
def test_same_bits_as_the_cpu_operator(
    sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    p = Problem(sizes, dtypes, masked=sizes[1] > 1)
    k = min(33, sizes[1])
    assert same(run(p, k, Schedule(seed=sizes[0]))[0], on_the_cpu(p, k))


def test_more_rows_than_a_tile_and_several_lists_of_swaps() -> None:
    p = Problem((34, 70, 8), masked=False)
    assert same(run(p, 3, Schedule(seed=1))[0], on_the_cpu(p, 3))
    p = Problem((1, 4700, 3))
    arguments = (p.gradient, p.table, p.current, p.allowed, 40)
    found, traffic = _emulator.run("top_swaps", *arguments, schedule=Schedule(seed=2))
    assert len(traffic) == 4  # ten lists, two lists, one
    assert same(list(found), list(ops.top_swaps(*arguments)))


def test_misaligned_tables_are_read_by_elements() -> None:
    p = Problem((2, 70, 16))
    expected = on_the_cpu(p, 5)
    p.table = torch.zeros(p.table.numel() + 1)[1:].view(p.table.shape).copy_(p.table)
    assert same(run(p, 5, Schedule())[0], expected)


def test_special_values() -> None:
    p = Problem((4, 300, 4))
    assert p.allowed is not None
    p.table[~p.allowed] = math.nan
    p.logits[:, ~p.allowed] = math.nan
    p.logits[0] = -math.inf
    p.logits[1, 0] = math.nan
    p.logits[2, :256] = -math.inf
    p.logits[3] *= 1e4
    expected = on_the_cpu(p, 5)
    for ours, theirs in zip(run(p, 5, Schedule(seed=1))[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert expected[0].isnan().all(dim=1).tolist() == [True, True, False, False]


def test_unknown_tokens_are_not_numbers() -> None:
    p = Problem((2, 20, 4), masked=False)
    arguments = (p.gradient, p.table, torch.tensor([3, 20]), None, 3)
    (scores, tokens), _ = _emulator.run("top_swaps", *arguments, schedule=Schedule())
    assert scores[0].isfinite().all()
    assert scores[1].isnan().all()
    assert tokens[1].tolist() == [0, 1, 2]


def test_no_rows() -> None:
    p = Problem((0, 20, 4))
    assert run(p, 3, Schedule())[1] == []


def test_no_barrier_can_be_spared() -> None:
    p = Problem((9, 300, 70), masked=False)
    expected, traffic = run(p, 20, Schedule())
    lines = {line for one in traffic for line in one.barriers}
    assert len(lines) == 6
    for line in lines:
        wrong = False
        for seed in range(1, 9):
            try:
                found, _ = run(p, 20, Schedule(seed=seed, dropped_barrier=line))
                wrong = not same(found, expected)
            except _emulator.KernelError:
                wrong = True
            if wrong:
                break
        assert wrong, f"the barrier at line {line} is never missed"


def test_bytes() -> None:
    """A tile of rows reads the table once, and what is updated is read and written once."""
    p = Problem((8, 1024, 64), masked=False)
    _, traffic = run(p, 4, Schedule())
    largest, parts, rows, _, gradients, _, update, _, swaps, _ = traffic
    assert largest.bytes_loaded == p.logits.nbytes
    small = 64 * 1024  # states of rows, and what belongs to parts
    assert parts.bytes_loaded <= p.table.nbytes + p.logits.nbytes + small
    assert rows.bytes_stored == 4 * (8 * 64 + 8 * 2)
    upstream = 8 * p.gradient.nbytes  # by every tile of tokens
    states = 56 * p.logits.numel()
    assert gradients.bytes_loaded == p.table.nbytes + p.logits.nbytes + upstream + states
    assert gradients.bytes_stored == p.logits.nbytes
    active = 5 / 8
    assert update.bytes_stored == 3 * active * p.logits.nbytes
    assert swaps.bytes_loaded <= p.table.nbytes + upstream + small
