"""How many images a device takes at once, and what happens where its memory runs out."""

import pytest
import torch

from pydetox.errors import DeviceMemoryError, explain, is_out_of_memory
from pydetox.models import memory
from pydetox.models.memory import Batching, activation_bytes, images_at_once

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU: what torch says of its memory."""
    says = {"free": 70 * GIB, "total": 80 * GIB, "reserved": 0, "allocated": 0, "fraction": 1.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (says["free"], says["total"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: says["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: says["allocated"])
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda d: says["fraction"], raising=False
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: says.update(emptied=True))
    return says


def test_a_gpu_gives_a_share_of_what_is_free(gpu):
    assert activation_bytes(GPU) == int(0.6 * 70 * GIB)
    # What torch keeps for itself is free to tensors, too.
    gpu.update(free=10 * GIB, reserved=60 * GIB, allocated=20 * GIB)
    assert activation_bytes(GPU) == int(0.6 * 50 * GIB)
    # Of workers that share a GPU each has its part.
    gpu.update(free=70 * GIB, reserved=10 * GIB, allocated=5 * GIB, fraction=0.25)
    assert activation_bytes(GPU) == int(0.6 * 15 * GIB)
    gpu.update(reserved=30 * GIB, allocated=30 * GIB)
    assert activation_bytes(GPU) == 0


def test_a_vit_l14_in_bfloat16_is_not_split_on_a_large_gpu(gpu):
    assert images_at_once(197 << 20, GPU) == 128  # the fixed 2 GiB held 10


def test_a_little_more_or_less_free_memory_does_not_change_a_batch(gpu):
    counts = set()
    for free in range(60 * GIB, 75 * GIB, GIB // 3):
        gpu["free"] = free
        counts.add(images_at_once(150 << 20, GPU))
    assert counts == {128, 256}
    gpu["free"] = 0
    assert images_at_once(1 << 20, GPU) == 1


def test_a_cpu_gives_a_constant_unless_it_has_hardly_any_memory(monkeypatch):
    monkeypatch.setattr(memory, "_available_on_host", lambda: 64 * GIB)
    assert activation_bytes(CPU) == GIB // 2
    assert images_at_once(100 << 20, CPU) == 5
    monkeypatch.setattr(memory, "_available_on_host", lambda: GIB)
    assert activation_bytes(CPU) == GIB // 4
    monkeypatch.setattr(memory, "_available_on_host", lambda: None)
    assert activation_bytes(CPU) == GIB // 2


def test_this_host_says_what_it_has_or_nothing():
    available = memory._available_on_host()
    assert available is None or 1 << 20 < available < 1 << 50


def test_the_batch_is_halved_until_it_fits(gpu):
    batching, tried = Batching(13, GPU, "model"), []

    def work(count):
        tried.append(count)
        if count > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return f"{count} fit"

    assert batching.run(work) == "3 fit"
    assert tried == [13, 6, 3]
    assert (batching.count, batching.halved) == (3, 2)
    assert batching.describe() == "at most 3 images at once (halved 2 times: memory ran out)"
    assert gpu["emptied"]
    assert batching.run(work) == "3 fit"  # it stays there
    assert tried == [13, 6, 3, 3]


def test_where_one_image_does_not_fit_the_error_is_one_line():
    def work(count):
        raise RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 8 bytes\nstack")

    expected = "suspect: out of memory on cpu even with one at a time"
    with pytest.raises(DeviceMemoryError, match=expected) as caught:
        Batching(4, CPU, "suspect").run(work)
    assert "\n" not in str(caught.value)
    assert explain(caught.value) == str(caught.value)


def test_other_errors_are_not_tried_again():
    tried = []

    def work(count):
        tried.append(count)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        Batching(8, CPU, "model").run(work)
    assert tried == [8]


def test_a_failed_try_is_gone_before_the_next():
    """Its tensors would take the room of the next one's otherwise."""
    import weakref

    alive = []

    def work(count):
        assert all(ref() is None for ref in alive)
        tensor = torch.zeros(count)
        alive.append(weakref.ref(tensor))
        if count > 1:
            raise MemoryError
        return count

    assert Batching(8, CPU, "model").run(work) == 1
    assert len(alive) == 4


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_work_over_many_items_goes_on_with_smaller_parts():
    done, tried = [], []

    def work(part):
        tried.append(part.stop - part.start)
        if part.stop - part.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        done.extend(range(part.start, part.stop))
        return part.stop - part.start

    batching = Batching(12, CPU, "model")
    assert list(batching.over(10, work)) == [3, 3, 3, 1]
    assert done == list(range(10))
    assert tried == [10, 6, 3, 3, 3, 1]
    assert list(Batching(4, CPU, "model").over(0, work)) == []


def test_work_that_cannot_be_split_ends_at_once():
    tried = []

    def work(count):
        tried.append(count)
        raise MemoryError("no room")

    expected = "PAR: out of memory on cpu with a batch of 8, which cannot be split"
    with pytest.raises(DeviceMemoryError, match=expected):
        Batching(8, CPU, "PAR", divisible=False).run(work)
    assert tried == [8]
