"""The emulator itself: right kernels come out right, faulty ones are reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pydetox import _emulator

SEEDS = range(12)


@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
def test_block_sum_is_right_in_every_schedule(threads: int) -> None:
    x = np.arange(4 * threads, dtype=np.float32)
    for seed in SEEDS:
        out = np.full(4, np.nan, np.float32)
        traffic = _emulator.block_sum(x, out, threads, _emulator.Schedule(seed=seed))
        np.testing.assert_array_equal(out, x.reshape(4, -1).sum(1))
        assert (traffic.loads, traffic.stores) == (4 * threads, 4)
        assert (traffic.bytes_loaded, traffic.bytes_stored) == (x.nbytes, out.nbytes)
        assert len(traffic.barriers) == 1


def test_a_missing_barrier_shows() -> None:
    x = np.arange(1024, dtype=np.float32)
    wrong = 0
    for seed in SEEDS:
        out = np.full(4, np.nan, np.float32)
        schedule = _emulator.Schedule(seed=seed, dropped_barrier=_emulator.DROP_ALL_BARRIERS)
        _emulator.block_sum(x, out, 256, schedule)
        wrong += not np.array_equal(out, x.reshape(4, -1).sum(1))
    assert wrong > len(SEEDS) / 2


def test_shuffles() -> None:
    x = np.arange(32, dtype=np.float32)
    lane = np.arange(32)
    for seed in SEEDS:
        out = np.full((4, 32), np.nan, np.float32)
        _emulator.shuffles(x, out, _emulator.Schedule(seed=seed))
        np.testing.assert_array_equal(out[0], np.full(32, 5))
        np.testing.assert_array_equal(out[1], lane ^ 3)
        np.testing.assert_array_equal(out[2], np.where(lane >= 2, lane - 2, lane))
        np.testing.assert_array_equal(out[3], np.where(lane < 30, lane + 2, lane))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("barrier in a branch", "divergent barrier.* 57 threads have returned, 7 threads wait"),
        ("two barriers", "divergent barrier.* 32 threads wait .* 32 threads wait"),
        ("early return", "divergent barrier.* 1 threads have returned, 63 threads wait"),
        ("partial warp", "divergent barrier.* 31 threads wait in a warp operation"),
        ("shuffle from outside", "reads lane 6, which is not in its mask"),
        ("load past the end", "loads 4 bytes out of bounds"),
        ("store to an input", "stores to the input x"),
        ("misaligned", "loads 16 bytes misaligned"),
        ("shared overflow", "past its 256 bytes of dynamic shared memory"),
    ],
)
def test_faults_are_reported(fault: str, message: str) -> None:
    x = np.zeros(128, np.float32)
    for seed in SEEDS:
        with pytest.raises(_emulator.KernelError, match=message):
            _emulator.faulty(fault, x, np.zeros(2, np.float32), 64, _emulator.Schedule(seed=seed))


def test_uninitialised_shared_memory_is_nan_in_every_block() -> None:
    out = np.zeros(6, np.float32)
    _emulator.faulty(
        "uninitialised shared", np.zeros(384, np.float32), out, 64, _emulator.Schedule()
    )
    assert np.isnan(out).all()


def test_a_schedule_is_reproducible() -> None:
    x = np.random.default_rng(0).random(1024, dtype=np.float32)
    results = []
    for _ in range(2):
        out = np.zeros(4, np.float32)
        schedule = _emulator.Schedule(seed=3, dropped_barrier=_emulator.DROP_ALL_BARRIERS)
        _emulator.block_sum(x, out, 256, schedule)
        results.append(out)
    np.testing.assert_array_equal(*results)


def test_one_block_alone() -> None:
    x = np.ones(1024, np.float32)
    out = np.zeros(4, np.float32)
    _emulator.block_sum(x, out, 256, _emulator.Schedule(only_block=2))
    np.testing.assert_array_equal(out, [0, 0, 256, 0])


def test_the_cache_model_counts_misses_by_sector() -> None:
    x = np.zeros(1024, np.float32)
    schedule = _emulator.Schedule(cache_bytes=1 << 20)
    traffic = _emulator.block_sum(x, np.zeros(4, np.float32), 256, schedule)
    sectors = (x.ctypes.data + x.nbytes - 1) // 32 - x.ctypes.data // 32 + 1
    assert traffic.dram_bytes_read == 32 * sectors


def test_an_operator_is_refused_what_it_does_not_take() -> None:
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"z must be \[K, B, D\], found \[2, 3\]"):
        _emulator.run("embedding_collapse", z)
    with pytest.raises(RuntimeError, match="between begin"):
        torch.ops.pydetox_emulator.embedding_collapse(z[None])


def test_a_dry_run_notes_the_launches_alone() -> None:
    z = torch.ones(3, 5, 7)
    schedule = _emulator.Schedule(dry=True)
    _, (norms, sums) = _emulator.run("embedding_collapse", z, schedule=schedule)
    assert (norms.blocks, norms.threads, norms.shared_bytes) == (2, 256, 0)
    assert (sums.blocks, sums.threads, sums.shared_bytes) == (3, 256, 2048)
    assert norms.loads == sums.stores == 0
