"""Every CUDA kernel over lists of weights, run from its .cuh by the emulator.

Sketches, linear combinations and products with thin matrices must be the CPU's, bit for bit. Inner
products are added up in another order inside a chunk than on the CPU: there the truth is float64
arithmetic, and the bits must not depend on the schedule.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydetox import _emulator, ops
from pydetox.ops import reference
from pydetox.ops.weights import matrix_shape, sketch_key

Schedule = _emulator.Schedule
SCHEDULES = [Schedule(), Schedule(seed=1), Schedule(seed=2)]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MIXED = (F32, BF16, F64, F16)
SHAPES = [(300,), (3, 5, 7), (1,), (0, 4), (), (257,)]


def weights(
    seed: int, dtypes: tuple[torch.dtype, ...] = (F32,), shapes: list[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, dtype=F64, generator=generator).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]


def chunks(tensors: list[Tensor], elements: int = 65536) -> int:
    return sum(-(-t.numel() // elements) for t in tensors)


def joined(lists: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]


def gram(lists: list[list[Tensor]], schedule: Schedule) -> tuple[Tensor, list]:
    base, *models = lists
    return _emulator.run("weight_diff_gram", base, joined(models), len(models), schedule=schedule)


def project(lists: list[list[Tensor]], schedule: Schedule) -> tuple[Tensor, list]:
    base, model, *directions = lists
    arguments = (base, model, joined(directions), len(directions))
    return _emulator.run("weight_diff_project", *arguments, schedule=schedule)


def sketch(
    lists: list[list[Tensor]], size: int, schedule: Schedule, seed: int = 3
) -> tuple[Tensor, list]:
    keys = [sketch_key(seed, name) for name in names(len(lists[0]))]
    return _emulator.run("weight_diff_sketch", *lists, keys, size, schedule=schedule)


def matmul(
    lists: list[list[Tensor]], factors: list[Tensor], side: str, schedule: Schedule
) -> tuple[list[Tensor], list]:
    return _emulator.run("weight_diff_matmul", *lists, factors, side == "left", schedule=schedule)


def apply(
    base: list[Tensor],
    vectors: list[list[Tensor]],
    rows: Tensor,
    out: list[list[Tensor]],
    schedule: Schedule,
) -> list:
    arguments = (base, joined(vectors), rows, joined(out))
    return _emulator.run("apply_task_vectors", *arguments, schedule=schedule)[1]


def factors_of(tensors: list[Tensor], side: str, widths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    depths = [matrix_shape(t)[side == "right"] for t in tensors]
    return [
        torch.randn(depth, widths[i % len(widths)], dtype=F64, generator=generator)
        for i, depth in enumerate(depths)
    ]


def names(count: int) -> list[str]:
    return [f"{i:02}" for i in range(count)]  # in alphabetical order, as the operator sorts them


@pytest.mark.parametrize("models", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F64,), MIXED], ids=str)
def test_gram(models: int, dtypes: tuple[torch.dtype, ...]) -> None:
    lists = [weights(i, dtypes) for i in range(models + 1)]
    expected = reference.weight_diff_gram(lists[0], lists[1:])
    results = [gram(lists, schedule)[0] for schedule in SCHEDULES]
    torch.testing.assert_close(results[0], expected, rtol=1e-13, atol=1e-10)
    assert torch.equal(results[0], results[0].T)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("directions", [1, 2, 16, 19])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F64,), MIXED], ids=str)
def test_project(directions: int, dtypes: tuple[torch.dtype, ...]) -> None:
    lists = [weights(i, dtypes) for i in range(directions + 2)]
    expected = reference.weight_diff_project(lists[0], lists[1], lists[2:])
    results = [project(lists, schedule)[0] for schedule in SCHEDULES]
    torch.testing.assert_close(results[0], expected, rtol=1e-12, atol=1e-11)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("size", [64, 512, 2048])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F64,), MIXED], ids=str)
def test_sketch_has_the_bits_of_the_cpu(size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    lists = [weights(i, dtypes, [*SHAPES, (5000,)]) for i in range(2)]
    expected = ops.weight_diff_sketch(*lists, names(len(lists[0])), seed=3, size=size)
    for schedule in SCHEDULES:
        assert torch.equal(sketch(lists, size, schedule)[0], expected)


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F64,), MIXED], ids=str)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(("vectors", "results"), [(1, 1), (3, 9), (0, 1), (6, 5)])
def test_apply_has_the_bits_of_the_cpu(
    dtypes: tuple[torch.dtype, ...], per_tensor: bool, vectors: int, results: int
) -> None:
    base = weights(0, dtypes)
    # Of the base's dtypes, and of another: lists of one dtype and of several.
    changes = [weights(i + 1, dtypes if per_tensor else (F32,)) for i in range(vectors)]
    shape = (results, vectors, len(base)) if per_tensor else (results, vectors)
    rows = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    expected = ops.apply_task_vectors(base, changes, rows)
    out = [[torch.zeros_like(t) for t in base] for _ in range(results)]
    apply(base, changes, rows, out, SCHEDULES[1])
    for found, wanted in zip(joined(out), joined(expected), strict=True):
        assert torch.equal(found, wanted)


def test_chunks_and_launches_change_nothing() -> None:
    """More tensors than a launch holds, and a tensor of more than one chunk."""
    shapes = [(70000,)] + [(7,)] * 40
    lists = [weights(i, (F32,), shapes) for i in range(2)]
    matrix, traffic = gram(lists, SCHEDULES[0])
    expected = reference.weight_diff_gram(lists[0], lists[1:])
    torch.testing.assert_close(matrix, expected, rtol=1e-13, atol=0)
    assert len(traffic) == 2 + 2  # 32 tensors and 9, the sum, the matrix
    expected_sketch = ops.weight_diff_sketch(*lists, names(41), seed=3, size=64)
    assert torch.equal(sketch(lists, 64, SCHEDULES[0])[0], expected_sketch)


#: More and fewer than a tile and a run, one row or column, none, a convolution, a bias.
MATRICES = [(65, 33), (70, 72), (3, 5, 7), (1, 130), (130, 1), (0, 4), (4, 0), (9,), (20, 100)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("widths", [[1, 16, 0], [33]], ids=str)
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F64,), MIXED], ids=str)
def test_matmul_has_the_bits_of_the_cpu(
    side: str, widths: list[int], dtypes: tuple[torch.dtype, ...]
) -> None:
    lists = [weights(0, dtypes, MATRICES), weights(1, dtypes[::-1], MATRICES)]
    factors = factors_of(lists[0], side, widths)
    expected = ops.weight_diff_matmul(*lists, factors, side=side)
    for schedule in SCHEDULES:
        results, _ = matmul(lists, factors, side, schedule)
        for found, wanted in zip(results, expected, strict=True):
            assert torch.equal(found, wanted)


def test_matmul_in_several_launches() -> None:
    lists = [weights(i, (F32,), [(3, 2)] * 50) for i in range(2)]
    factors = factors_of(lists[0], "right", [2])
    results, traffic = matmul(lists, factors, "right", SCHEDULES[0])
    assert len(traffic) == 2
    for found, wanted in zip(results, ops.weight_diff_matmul(*lists, factors), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("side", ["right", "left"])
def test_matmul_reads_every_weight_once(side: str) -> None:
    """Up to width 32; the factor comes once for every 64 rows (left: columns), from a cache."""
    lists = [weights(i, (F32,), [(128, 192)]) for i in range(2)]
    factors = factors_of(lists[0], side, [32])
    bytes_of_weights = sum(one[0].nbytes for one in lists)
    (traffic,) = matmul(lists, factors, side, Schedule(cache_bytes=512 * 1024))[1]
    sides = {"right": 128, "left": 192}[side]
    assert traffic.bytes_loaded == bytes_of_weights + factors[0].nbytes * sides // 64
    assert traffic.dram_bytes_read <= 1.05 * (bytes_of_weights + factors[0].nbytes)
    assert traffic.bytes_stored == sides * 32 * 8


@pytest.mark.parametrize("side", ["right", "left"])
def test_matmul_without_a_barrier_is_wrong_in_some_schedule(side: str) -> None:
    lists = [weights(i, (F32,), [(70, 70)]) for i in range(2)]
    factors = factors_of(lists[0], side, [16])
    (expected,), (traffic,) = matmul(lists, factors, side, Schedule())
    assert len(traffic.barriers) == 2
    for line in traffic.barriers:
        wrong = 0
        for seed in range(1, 6):
            try:
                (found,), _ = matmul(
                    lists, factors, side, Schedule(seed=seed, dropped_barrier=line)
                )
                wrong += not torch.equal(found, expected)
            except _emulator.KernelError:
                wrong += 1
        assert wrong, f"line {line}"


def test_every_byte_is_moved_once() -> None:
    shapes = [(4096,), (513,), (64, 3)]

    def loaded(traffic: list) -> int:
        return sum(one.bytes_loaded for one in traffic)

    def size(lists: list[list[Tensor]]) -> int:
        return sum(t.nbytes for one in lists for t in one)

    eight = [weights(i, (F32,), shapes) for i in range(9)]
    partial = 2 * 8 * 64 * chunks(eight[0])  # written and read again
    assert loaded(gram(eight, SCHEDULES[0])[1]) <= 1.05 * size(eight) + partial
    sixteen = [weights(i, (F32,), shapes) for i in range(18)]
    assert loaded(project(sixteen, SCHEDULES[0])[1]) <= 1.05 * size(sixteen)
    two = sixteen[:2]
    partial = 8 * 64 * chunks(two[0], 64 * 64)
    assert loaded(sketch(two, 64, SCHEDULES[0])[1]) <= 1.05 * size(two) + partial
    base, vector, out = sixteen[:3]
    (traffic,) = apply(base, [vector], torch.ones(1, 1, dtype=F64), [out], SCHEDULES[0])
    # And a coefficient, from a cache, for each part of a thread: of two words of four, or less.
    steps = 8 * sum(t.numel() // 4 + 8 for t in base)
    assert size(sixteen[:2]) < traffic.bytes_loaded <= size(sixteen[:2]) + steps
    assert traffic.bytes_stored == size(sixteen[:1])


@pytest.mark.parametrize(
    ("run", "count"), [(gram, 9), (project, 18), (lambda lists, s: sketch(lists, 512, s), 2)]
)
def test_without_its_barrier_a_kernel_is_wrong_in_some_schedule(run, count: int) -> None:
    # Whole tiles: the last of a warp's sums are the ones that come too late.
    lists = [weights(i, (F32,), [(700,)]) for i in range(count)]
    expected, traffic = run(lists, Schedule())
    lines = {line for one in traffic for line in one.barriers}
    assert lines
    for line in lines:
        wrong = 0
        for seed in range(1, 6):
            try:
                found, _ = run(lists, Schedule(seed=seed, dropped_barrier=line))
                wrong += not torch.equal(found, expected)
            except _emulator.KernelError:
                wrong += 1
        assert wrong, f"line {line}"


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("shifts", [[1], [3], [0, 1], [2, 0, 0]], ids=str)
def test_views_at_any_alignment(dtype: torch.dtype, shifts: list[int]) -> None:
    """Lists that lie alike to 16 bytes, and lists that do not: the same bits, and no byte twice."""
    shapes = [(700,), (2,), (33, 5)]
    plain = [weights(i, (dtype,), shapes) for i in range(9)]

    def shifted(tensors: list[Tensor], by: int) -> list[Tensor]:
        views = [torch.zeros(t.numel() + by, dtype=dtype)[by:].view(t.shape) for t in tensors]
        return [view.copy_(t) for view, t in zip(views, tensors, strict=True)]

    views = [shifted(one, shifts[i % len(shifts)]) for i, one in enumerate(plain)]
    schedule = Schedule(seed=1)
    expected = reference.weight_diff_gram(plain[0], plain[1:])
    found, traffic = gram(views, schedule)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    size = sum(t.nbytes for one in plain for t in one)
    assert traffic[0].bytes_loaded == size
    expected = reference.weight_diff_project(plain[0], plain[1], plain[2:])
    torch.testing.assert_close(project(views, schedule)[0], expected, rtol=1e-12, atol=1e-9)
    expected = ops.weight_diff_sketch(*plain[:2], names(3), seed=3, size=128)
    assert torch.equal(sketch(views[:2], 128, schedule)[0], expected)
    rows = torch.randn(2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    wanted = ops.apply_task_vectors(plain[0], plain[1:3], rows)
    apply(views[0], views[1:3], rows, views[3:5], schedule)
    assert all(map(torch.equal, joined(views[3:5]), joined(wanted)))
    for side in ("right", "left"):
        factors = factors_of(plain[0], side, [3])
        products = ops.weight_diff_matmul(*plain[:2], factors, side=side)
        assert all(map(torch.equal, matmul(views[:2], factors, side, schedule)[0], products))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_aligned_lists_are_read_in_words(dtype: torch.dtype) -> None:
    """16 bytes a load: a chunk of 4,096 elements has no head and no tail."""
    lists = [weights(i, (dtype,), [(4096,)]) for i in range(9)]
    for traffic in (gram(lists, Schedule())[1], project(lists, Schedule())[1]):
        assert traffic[0].bytes_loaded == 16 * traffic[0].loads
    matrices = [weights(i, (dtype,), [(64, 64)]) for i in range(2)]
    for side in ("right", "left"):
        factors = factors_of(matrices[0], side, [8])
        (traffic,) = matmul(matrices, factors, side, Schedule())[1]
        words = 2 * 64 * 64 * matrices[0][0].element_size() // 16
        assert traffic.loads == words + factors[0].numel()


def test_apply_writes_over_its_base() -> None:
    for dtypes in ((F32,), (BF16,), MIXED):
        base, vector = weights(0, dtypes), weights(1, dtypes)
        rows = torch.tensor([[-0.75]], dtype=F64)
        (expected,) = ops.apply_task_vectors(base, [vector], rows)
        apply(base, [vector], rows, [base], Schedule(seed=1))
        assert all(map(torch.equal, base, expected))


def test_too_many_lists() -> None:
    one = weights(0, (F32,), [(3,)])
    with pytest.raises(ValueError, match="at most 320 lists on CUDA, found 321"):
        gram([one] * 321, SCHEDULES[0])


def test_nothing() -> None:
    empty = [torch.zeros(0)]
    assert torch.equal(gram([empty] * 3, SCHEDULES[0])[0], torch.zeros(2, 2, dtype=F64))
    assert torch.equal(sketch([empty] * 2, 64, SCHEDULES[0])[0], torch.zeros(64, dtype=F64))
