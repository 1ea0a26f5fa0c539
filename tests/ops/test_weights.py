"""Operators over lists of weights, against extended precision and against plain PyTorch."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import (
    apply_task_vectors,
    reference,
    weight_diff_gram,
    weight_diff_matmul,
    weight_diff_project,
    weight_diff_sketch,
)
from pydetox.ops.weights import CHUNK, matrix_shape, sketch_chunk, sketch_key

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

#: Longer than a chunk, odd, one element, none, and everything between a block's ends.
SHAPES = [(70001,), (3, 5, 7), (1,), (0, 4), (), (512,), (511,), (513,), (9,)]


def weights(seed: int, dtypes: tuple[torch.dtype, ...] = (F32,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, dtype=F64, generator=generator).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(SHAPES)
    ]


def exact(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([t.double().numpy().reshape(-1) for t in tensors]).astype(np.longdouble)


def names(count: int = len(SHAPES)) -> list[str]:
    return [f"block.{i}.weight" for i in range(count)]


DTYPES = [(F32,), (F64,), (BF16,), (F16,), (F32, BF16, F64, F16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_gram(dtypes: tuple[torch.dtype, ...], count: int, capability: str) -> None:
    base = weights(0, dtypes)
    models = [weights(i + 1, dtypes[::-1]) for i in range(count)]
    found = weight_diff_gram(base, models)
    differences = np.stack([exact(model) - exact(base) for model in models])
    expected = differences @ differences.T
    assert found.dtype == F64
    assert torch.equal(found, found.T)
    np.testing.assert_allclose(found.numpy(), expected.astype(float), rtol=1e-12, atol=1e-9)
    plain = reference.weight_diff_gram(base, models).numpy()
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected))) * 2.0**-53
    ours = np.abs((found.numpy() - expected) / scale).max()
    theirs = np.abs((plain - expected) / scale).max()
    assert ours <= 2 * theirs + 2


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 4, 7])
def test_project(dtypes: tuple[torch.dtype, ...], count: int, capability: str) -> None:
    base, model = weights(0, dtypes), weights(1, dtypes[::-1])
    directions = [weights(i + 2, dtypes) for i in range(count)]
    found = weight_diff_project(base, model, directions)
    difference = exact(model) - exact(base)
    expected = np.array([exact(d) @ difference for d in directions])
    scale = np.array([np.linalg.norm(exact(d).astype(float)) for d in directions])
    scale = scale * np.linalg.norm(difference.astype(float)) * 2.0**-53
    plain = reference.weight_diff_project(base, model, directions).numpy()
    ours = np.abs((found.numpy() - expected) / scale).max()
    theirs = np.abs((plain - expected) / scale).max()
    assert ours <= 2 * theirs + 2


def test_differences_are_exact_where_float32_would_lose_them() -> None:
    base = [torch.tensor([1.0, 2.0**-30], dtype=F32)]
    model = [torch.tensor([1.0 + 2.0**-23, 1.0], dtype=F32)]
    expected = (2.0**-23) ** 2 + (1 - 2.0**-30) ** 2
    assert float(weight_diff_gram(base, [model])[0, 0]) == expected


# ---- the sketch ---------------------------------------------------------------------------------


def philox(key: int, counter: tuple[int, int]) -> list[int]:
    """Philox4x32-10 from its paper, in Python integers."""
    word = [counter[0] & 0xFFFFFFFF, counter[0] >> 32, counter[1] & 0xFFFFFFFF, counter[1] >> 32]
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * word[0], 0xCD9E8D57 * word[2]
        word = [
            second >> 32 ^ word[1] ^ low,
            second & 0xFFFFFFFF,
            first >> 32 ^ word[3] ^ high,
            first & 0xFFFFFFFF,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return word


def test_philox_known_answers() -> None:
    """The vectors that its authors publish with their library."""
    assert philox(0, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**64 - 1
    assert philox(ones, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x85A308D3_243F6A88, 0x03707344_13198A2E)
    assert philox(0x299F31D0_A4093822, pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def sketch_by_definition(
    base: list[Tensor], model: list[Tensor], names: list[str], seed: int, size: int
) -> np.ndarray:
    result = np.zeros(size, np.longdouble)
    for start, end, name in zip(base, model, names, strict=True):
        difference = exact([end]) - exact([start])
        key = sketch_key(seed, name) % 2**64
        for block in range(-(-len(difference) // size)):
            part = difference[block * size : (block + 1) * size]
            random = philox(key, (block, 0))
            rotation = (random[1] << 32 | random[0]) % size
            bits = np.array(
                [philox(key, (block, 1 + g)) for g in range(-(-len(part) // 128))], dtype=np.uint32
            )
            signs = 1 - 2.0 * np.unpackbits(bits.view(np.uint8), bitorder="little")[: len(part)]
            places = (np.arange(len(part)) + rotation) % size
            result[places] += signs * part
    return result


@pytest.mark.parametrize("size", [64, 256, 4096])
@pytest.mark.parametrize("dtypes", [(F32,), (F32, BF16, F64, F16)], ids=str)
def test_sketch_is_what_its_definition_says(
    size: int, dtypes: tuple[torch.dtype, ...], capability: str
) -> None:
    base, model = weights(0, dtypes), weights(1, dtypes)
    found = weight_diff_sketch(base, model, names(), seed=5, size=size)
    expected = sketch_by_definition(base, model, names(), 5, size)
    np.testing.assert_allclose(found.numpy(), expected.astype(float), rtol=0, atol=1e-11)
    plain = reference.weight_diff_sketch(base, model, names(), seed=5, size=size)
    np.testing.assert_allclose(plain.numpy(), expected.astype(float), rtol=0, atol=1e-11)


def test_inner_products_of_sketches_are_unbiased_and_within_their_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    size, seeds = 64, 400
    zero = [torch.zeros(1500), torch.zeros(700)]
    # Periodic and correlated: the worst for a projection that keeps neighbours together.
    x = [torch.randn(1500, generator=generator), torch.arange(700).remainder(64).eq(3).float()]
    y = [x[0] + torch.randn(1500, generator=generator), 3 * x[1]]
    inner = sum(float(a.double() @ b.double()) for a, b in zip(x, y, strict=True))
    norms = [sum(float(t.double().square().sum()) for t in v) for v in (x, y)]
    bound = (norms[0] * norms[1] + inner**2) / size
    estimates = np.array(
        [
            float(
                weight_diff_sketch(zero, x, names(2), seed=s, size=size)
                @ weight_diff_sketch(zero, y, names(2), seed=s, size=size)
            )
            for s in range(seeds)
        ]
    )
    assert abs(estimates.mean() - inner) < 4 * math.sqrt(bound / seeds)
    assert estimates.var() < 1.4 * bound  # a sample variance: 5 standard errors are 35%
    assert estimates.var() > 0.2 * bound


def test_sketches_depend_on_names_and_seed_and_not_on_the_order_of_files() -> None:
    base, model = weights(0), weights(1)
    found = weight_diff_sketch(base, model, names(), seed=1)
    order = [4, 2, 8, 0, 1, 7, 6, 5, 3]
    shuffled = weight_diff_sketch(
        [base[i] for i in order], [model[i] for i in order], [names()[i] for i in order], seed=1
    )
    assert torch.equal(shuffled, found)
    assert not torch.equal(weight_diff_sketch(base, model, names(), seed=2), found)
    renamed = [f"visual.{name}" for name in names()]
    assert not torch.equal(weight_diff_sketch(base, model, renamed, seed=1), found)


# ---- in parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(F32,), (F32, BF16, F64, F16)], ids=str)
def test_parts_give_the_bits_of_the_whole(
    dtypes: tuple[torch.dtype, ...], capability: str, threads: None
) -> None:
    """Cut at multiples of a chunk, in order, with any number of threads."""
    lists = [weights(i, dtypes) for i in range(5)]
    big = [torch.cat([t.reshape(-1) for t in tensors] * 2) for tensors in lists]

    def parts(chunk: int) -> list[tuple[int, list[list[Tensor]]]]:
        """First element of `big`, and the parts of all models: `big` in three, then the rest."""
        edges = [0, chunk, 2 * chunk, len(big[0])]
        cut = [(begin, [[b[begin:end]] for b in big]) for begin, end in itertools.pairwise(edges)]
        return [*cut, (0, lists)]

    whole = [[b, *tensors] for b, tensors in zip(big, lists, strict=True)]
    gram, projection = torch.zeros(4, 4, dtype=F64), torch.zeros(3, dtype=F64)
    sketch = torch.zeros(256, dtype=F64)
    for number, (_, part) in enumerate(parts(CHUNK)):
        torch.set_num_threads(1 + number % 2)
        gram = weight_diff_gram(part[0], part[1:], start=gram)
        projection = weight_diff_project(part[0], part[1], part[2:], start=projection)
    for first, part in parts(sketch_chunk(256)):
        sketch = weight_diff_sketch(
            part[0],
            part[1],
            ["a.big"] if len(part[0]) == 1 else names(),
            seed=3,
            size=256,
            first_elements=[first] * len(part[0]),
            start=sketch,
        )
    assert torch.equal(gram, weight_diff_gram(whole[0], whole[1:]))
    assert torch.equal(projection, weight_diff_project(whole[0], whole[1], whole[2:]))
    once = weight_diff_sketch(whole[0], whole[1], ["a.big", *names()], seed=3, size=256)
    assert torch.equal(sketch, once)


def test_what_parts_must_be() -> None:
    x = [torch.zeros(3)]
    for start in (torch.zeros(2, 2), torch.zeros(3, 3, dtype=F64), torch.zeros(1, 4, dtype=F64)):
        with pytest.raises(UsageError, match=r"gram: start must be .* float64 \[2, 2\] on the CPU"):
            weight_diff_gram(x, [x, x], start=start)
    with pytest.raises(UsageError, match=r"project: start must be .*\[1\].*found .*\[2\]"):
        weight_diff_project(x, x, [x], start=torch.zeros(2, dtype=F64))
    with pytest.raises(UsageError, match=r"sketch: start must be .*\[64\]"):
        weight_diff_sketch(x, x, ["x"], seed=0, size=64, start=torch.zeros(65, dtype=F64))
    for firsts, found in (([1], "multiples of 4096"), ([-4096], "multiples"), ([0, 0], "1 and 2")):
        with pytest.raises(UsageError, match=f"first_elements must be 1 .*{found}"):
            weight_diff_sketch(x, x, ["x"], seed=0, size=64, first_elements=firsts)
    operators = torch.ops.pydetox
    with pytest.raises(ValueError, match="start must be"):
        operators.weight_diff_gram(x, x, 1, torch.zeros(1, 2, dtype=F64))
    with pytest.raises(ValueError, match="start must be"):
        operators.weight_diff_project(x, x, x, 1, torch.zeros(1))
    with pytest.raises(ValueError, match="multiples of 4096, found \\[3\\]"):
        operators.weight_diff_sketch(x, x, [0], 64, [3])
    with pytest.raises(ValueError, match="first_elements must be 1 multiples"):
        operators.weight_diff_sketch(x, x, [0], 64, [0, 0])


# ---- products with a thin matrix ----------------------------------------------------------------

#: Runs of 64 and tiles in every remainder, convolutions, one row or column, none, a bias.
MATRICES = [(65, 130), (3, 5, 2, 2), (300, 64), (1, 257), (257, 1), (0, 4), (4, 0), (70,), (13, 63)]


def matrices(seed: int, dtypes: tuple[torch.dtype, ...] = (F32,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, dtype=F64, generator=generator).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(MATRICES)
    ]


def factors(side: str, width: int, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(matrix_shape(t)[side == "right"], width, dtype=F64, generator=generator).to(
            dtype
        )
        for t in matrices(0)
    ]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 35])
@pytest.mark.parametrize("side", ["right", "left"])
def test_matmul(side: str, width: int, dtypes: tuple[torch.dtype, ...], capability: str) -> None:
    base, model, thin = matrices(0, dtypes), matrices(1, dtypes[::-1]), factors(side, width)
    found = weight_diff_matmul(base, model, thin, side=side)
    plain = reference.weight_diff_matmul(base, model, thin, side=side)
    for a, b, start, end, factor in zip(found, plain, base, model, thin, strict=True):
        difference = (exact([end]) - exact([start])).reshape(matrix_shape(start))
        wide = factor.numpy().astype(np.longdouble)
        if side == "left":
            expected, size = wide.T @ difference, np.abs(wide).T @ np.abs(difference)
        else:
            expected, size = difference @ wide, np.abs(difference) @ np.abs(wide)
        scale = size * 2.0**-53 + 1e-300  # of sums of nothing the error is 0
        assert a.dtype == F64
        assert tuple(a.shape) == expected.shape
        if expected.size:
            ours = np.abs((a.numpy() - expected) / scale).max()
            assert ours <= 2 * np.abs((b.numpy() - expected) / scale).max() + 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_matmul_adds_in_runs_of_64(side: str, capability: str) -> None:
    """The order that every implementation promises, by fused operations on exact fractions."""
    generator = torch.Generator().manual_seed(3)
    base, model = (torch.randn(150, 150, generator=generator) for _ in range(2))
    factor = torch.randn(150, 2, dtype=F64, generator=generator)
    (found,) = weight_diff_matmul([base], [model], [factor], side=side)
    difference = model.double() - base.double()
    for at, k in ((0, 0), (149, 1)):
        line = (difference[at] if side == "right" else difference[:, at]).tolist()
        total = 0.0
        for first in range(0, 150, 64):
            run = 0.0
            for x, y in zip(line[first : first + 64], factor[first:, k].tolist(), strict=False):
                run = float(Fraction(x) * Fraction(y) + Fraction(run))
            total += run
        assert float(found[at, k] if side == "right" else found[k, at]) == total


def test_matmul_takes_factors_of_any_float_and_each_of_its_own_width() -> None:
    base, model = matrices(0), matrices(1)
    thin = [f[:, : 1 + i].clone() for i, f in enumerate(factors("right", 9, F16))]
    for found, factor, a, b in zip(
        weight_diff_matmul(base, model, thin), thin, base, model, strict=True
    ):
        (alone,) = weight_diff_matmul([a], [b], [factor.double()])
        assert torch.equal(found, alone)
        assert found.shape == (a.shape[0], factor.shape[1])


def test_matmul_with_no_columns() -> None:
    base = matrices(0)
    assert [t.shape[1] for t in weight_diff_matmul(base, base, factors("right", 0))] == [0] * 9


@pytest.mark.slow
def test_matmul_of_a_tall_matrix(capability: str) -> None:
    """Taller than what fits side by side on one thread: the way it is split up changes nothing."""
    generator = torch.Generator().manual_seed(0)
    base, model = (torch.randn(5000, 300, generator=generator) for _ in range(2))
    factor = torch.randn(5000, 9, dtype=F64, generator=generator)
    (found,) = weight_diff_matmul([base], [model], [factor], side="left")
    (expected,) = reference.weight_diff_matmul([base], [model], [factor], side="left")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    (part,) = weight_diff_matmul([base[:, 64:70]], [model[:, 64:70]], [factor], side="left")
    assert torch.equal(part, found[:, 64:70])


# ---- linear combinations ------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_apply(dtypes: tuple[torch.dtype, ...], per_tensor: bool, capability: str) -> None:
    base = weights(0, dtypes)
    vectors = [weights(i + 1, (F32,)) for i in range(3)]
    shape = (2, 3, len(base)) if per_tensor else (2, 3)
    rows = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(9))
    found = apply_task_vectors(base, vectors, rows)
    expected = reference.apply_task_vectors(base, vectors, rows)
    for one, two in zip(found, expected, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.dtype == b.dtype
            # torch rounds bfloat16 and float16 twice, by way of float32.
            torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=0)
    exact_rows = rows if per_tensor else rows[..., None].expand(-1, -1, len(base))
    for m in range(2):
        for i, start in enumerate(base):
            wide = start.double()
            for r in range(3):
                wide = wide + exact_rows[m, r, i] * vectors[r][i].double()
            if start.dtype in (F32, F64):
                assert torch.equal(found[m][i], wide.to(start.dtype))


def test_results_are_rounded_once(capability: str) -> None:
    """Every half and its midpoints to the next, and a little to either side of those."""
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middle = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate(
        [halves, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9), [65519.99, 65520, 1e9]]
    )
    values = np.concatenate([values, -values, [np.inf, -np.inf, np.nan]])
    base = [torch.from_numpy(values)]
    nothing = torch.zeros(1, 0, dtype=F64)
    half = [torch.empty(len(values), dtype=F16)]
    apply_task_vectors(base, [], nothing, out=[half])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(half[0].numpy(), expected)
    assert np.array_equal(np.signbit(half[0].numpy()), np.signbit(expected))

    bits = np.arange(0, 0x7F80, dtype=np.uint32)
    numbers = (bits << 16).view(np.float32).astype(np.float64)
    middle = (numbers[1:] + numbers[:-1]) / 2
    even = np.where(bits[:-1] % 2 == 0, numbers[:-1], numbers[1:])
    below, above = np.nextafter(middle, 0), np.nextafter(middle, np.inf)
    cases = [(numbers, numbers), (middle, even), (below, numbers[:-1]), (above, numbers[1:])]
    for at, to in cases:
        brain = [torch.empty(len(at), dtype=BF16)]
        apply_task_vectors([torch.from_numpy(at)], [], nothing, out=[brain])
        np.testing.assert_array_equal(brain[0].double().numpy(), to)


def test_in_place_on_the_base() -> None:
    base, vectors = weights(0), [weights(1), weights(2)]
    rows = torch.tensor([[0.5, -1.0]])
    (expected,) = apply_task_vectors(base, vectors, rows)
    pointers = [t.data_ptr() for t in base]
    apply_task_vectors(base, vectors, rows, out=[base])
    assert [t.data_ptr() for t in base] == pointers
    assert all(torch.equal(a, b) for a, b in zip(base, expected, strict=True))


# ---- what holds for all of them -----------------------------------------------------------------


def products(base: list[Tensor], model: list[Tensor]) -> list[Tensor]:
    """Of both sides, with factors that are not contiguous."""
    wanted = [i for i, t in enumerate(base) if t.ndim]
    base, model = [base[i] for i in wanted], [model[i] for i in wanted]
    generator = torch.Generator().manual_seed(4)
    results = []
    for side in ("right", "left"):
        depths = [matrix_shape(t)[side == "right"] for t in base]
        thin = [torch.randn(5, d, dtype=F64, generator=generator).T for d in depths]
        results += weight_diff_matmul(base, model, thin, side=side)
    return results


def all_results(base, model, others) -> list[Tensor]:
    return [
        weight_diff_gram(base, [model, *others]),
        weight_diff_project(base, model, others),
        weight_diff_sketch(base, model, names(len(base)), seed=3, size=256),
        *products(base, model),
        *apply_task_vectors(base, others, [[0.3] * len(others)])[0],
    ]


def test_bits_depend_on_neither_threads_nor_instruction_set(capability: str, threads: None) -> None:
    from pydetox.ops import _library

    dtypes = (F32, BF16, F64, F16)
    lists = weights(0, dtypes), weights(1, dtypes), [weights(2, dtypes), weights(3, dtypes)]
    for one, seed in zip((lists[0], lists[1], *lists[2]), range(4), strict=True):
        one += matrices(seed, dtypes)
    torch.set_num_threads(2)
    found = all_results(*lists)
    torch.set_num_threads(1)
    single = all_results(*lists)
    _library.native.set_cpu_capability("scalar")
    scalar = all_results(*lists)
    for a, b, c in zip(found, single, scalar, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_strides_and_alignment_do_not_matter(capability: str) -> None:
    base, model, other = weights(0), weights(1), weights(2)

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), math.nan, dtype=t.dtype)
        wide[..., 1] = t
        return wide[..., 1]

    def misaligned(t: Tensor) -> Tensor:
        if not t.numel():
            return t
        store = bytearray(b"x" + t.numpy().tobytes())
        moved = torch.frombuffer(store, dtype=t.dtype, offset=1).view(t.shape)
        assert moved.data_ptr() % 4 == 1
        return moved

    expected = all_results(base, model, [other])
    for change in (strided, misaligned):
        lists = [change(t) for t in base], [change(t) for t in model], [[change(t) for t in other]]
        for a, b in zip(all_results(*lists), expected, strict=True):
            assert torch.equal(a, b)


def test_nothing_and_single_elements(capability: str) -> None:
    empty = [torch.zeros(0)]
    assert torch.equal(weight_diff_gram(empty, [empty, empty]), torch.zeros(2, 2, dtype=F64))
    assert torch.equal(weight_diff_sketch(empty, empty, ["a"], seed=0), torch.zeros(4096).double())
    assert weight_diff_gram(empty, []).shape == (0, 0)
    assert weight_diff_project([torch.ones(1)], [torch.zeros(1)], []).shape == (0,)
    one, two = [torch.tensor(1.5)], [torch.tensor(4.0)]
    assert float(weight_diff_gram(one, [two])) == 6.25
    assert float(weight_diff_project(one, two, [two])[0]) == 10.0
    assert float(weight_diff_sketch(one, two, ["a"], seed=0, size=64).abs().sum()) == 2.5
    assert float(apply_task_vectors(one, [two], [[0.5]])[0][0]) == 3.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_not_hidden(value: float, capability: str) -> None:
    base, model = weights(0), weights(1)
    model[0][12345] = value
    assert not torch.isfinite(weight_diff_gram(base, [weights(2), model])[1]).any()
    assert not torch.isfinite(weight_diff_project(base, model, [weights(2)])).any()
    assert (~torch.isfinite(weight_diff_sketch(base, model, names(), seed=0))).sum() == 1
    base[1][2, 4, 6] = value
    right, left = products(base[1:2], weights(1)[1:2])
    assert (~torch.isfinite(right)).any(dim=1).nonzero().tolist() == [[2]]
    assert (~torch.isfinite(left)).any(dim=0).nonzero().tolist() == [[34]]
    base[1][2, 4, 6] = 0
    result = apply_task_vectors(base, [model], [[2.0]])[0][0]
    assert (~torch.isfinite(result)).nonzero().tolist() == [[12345]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: weight_diff_gram([], []), "at least one tensor"),
        (lambda b: weight_diff_gram(b, [b[:1]]), r"models\[0\] must hold 2 tensors"),
        (
            lambda b: weight_diff_gram(b, [[b[1], b[0]]]),
            r"models\[0\]\[0\] must be \[3\].*\[2, 2\]",
        ),
        (lambda b: weight_diff_project(b, [t.int() for t in b], []), "found int32"),
        (lambda b: weight_diff_sketch(b, b, ["a", "a"], seed=0), "2, 1 different"),
        (lambda b: weight_diff_sketch(b, b, ["a", "b"], seed=0, size=100), "found 100"),
        (lambda b: weight_diff_matmul(b, b, [torch.ones(1, 1)]), "must be 2 matrices, found 1"),
        (
            lambda b: weight_diff_matmul(b, b, [torch.ones(1, 1), torch.ones(3, 1)]),
            r"factors\[1\] must be \[2, r\] for the right of base\[1\] \[2, 2\], found \[3, 1\]",
        ),
        (
            lambda b: weight_diff_matmul(b, b, [torch.ones(1, 1), b[1]], side="left"),
            r"factors\[0\] must be \[3, r\] for the left",
        ),
        (
            lambda b: weight_diff_matmul(b, b, [torch.ones(1, 1), b[1].int()]),
            r"factors\[1\] must be float64, found int32",
        ),
        (lambda b: weight_diff_matmul(b, b, b, side="top"), "'right' or 'left', found 'top'"),
        (
            lambda b: weight_diff_matmul([torch.tensor(1.0)], [torch.tensor(1.0)], [b[1]]),
            "at least one dimension",
        ),
        (lambda b: apply_task_vectors(b, [b], [[1.0, 2.0]]), r"must be \[1, 1\].*found \[1, 2\]"),
        (
            lambda b: apply_task_vectors(b, [b], [[1.0]], out=[b, b]),
            r"for 2 results.*found \[1, 1\]",
        ),
        (
            lambda b: apply_task_vectors(b, [b], [[1.0]], out=[[b[0], b[1].T]]),
            r"out\[0\]\[1\] must be contiguous",
        ),
    ],
)
def test_wrong_arguments(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call([torch.zeros(3), torch.zeros(2, 2)])


def test_the_operators_check_for_themselves() -> None:
    operators = torch.ops.pydetox
    base = [torch.zeros(3), torch.zeros(2, 2)]
    with pytest.raises(ValueError, match=r"models\[0\]\[0\] must be \[3\].*found \[2, 2\]"):
        operators.weight_diff_gram(base, base[::-1], 1)
    with pytest.raises(ValueError, match="1 lists of 2 tensors, found 3 tensors"):
        operators.weight_diff_gram(base, [*base, base[0]], 1)
    with pytest.raises(ValueError, match="power of two"):
        operators.weight_diff_sketch(base, base, [1, 2], 65)
    with pytest.raises(ValueError, match="2 tensors need as many keys, found 1"):
        operators.weight_diff_sketch(base, base, [1], 64)
    one = torch.ones(1, 1, dtype=F64)
    with pytest.raises(ValueError, match="factors must be 2 matrices, found 1"):
        operators.weight_diff_matmul(base, base, [one], False)
    with pytest.raises(
        ValueError, match=r"factors\[1\] must be \[2, r\].*\[2, 2\], found \[1, 1\]"
    ):
        operators.weight_diff_matmul(base, base, [one, one], False)
    with pytest.raises(ValueError, match=r"factors\[0\] must be float64, found float32"):
        operators.weight_diff_matmul(base, base, [one.float(), one], False)
    with pytest.raises(ValueError, match=r"base\[0\] must have at least one dimension"):
        operators.weight_diff_matmul([one[0, 0]], [one[0, 0]], [one], False)
    with pytest.raises(ValueError, match=r"coefficients must be \[1, 1\]"):
        operators.apply_task_vectors(base, base, torch.zeros(2, 1, dtype=F64), base)
    with pytest.raises(ValueError, match="float16, bfloat16, float32 or float64"):
        operators.weight_diff_gram([t.int() for t in base], [], 0)


def test_opcheck() -> None:
    base, model = [torch.randn(5), torch.randn(2, 3)], [torch.randn(5), torch.randn(2, 3)]
    operators = torch.ops.pydetox
    torch.library.opcheck(operators.weight_diff_gram.default, (base, model + base, 2))
    torch.library.opcheck(operators.weight_diff_project.default, (base, model, base, 1))
    torch.library.opcheck(operators.weight_diff_sketch.default, (base, model, [1, 2], 64))
    for left, depths in ((False, (1, 3)), (True, (5, 2))):
        thin = [torch.randn(depth, 4, dtype=F64) for depth in depths]
        torch.library.opcheck(operators.weight_diff_matmul.default, (base, model, thin, left))
    rows = torch.ones(1, 1, dtype=F64)
    results = [torch.empty(5), torch.empty(2, 3)]
    torch.library.opcheck(operators.apply_task_vectors.default, (base, model, rows, results))
