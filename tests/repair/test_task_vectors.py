import math
import os

import pytest
import torch
from safetensors.torch import save_file

from pydetox.errors import ArchitectureError, CheckpointError, UsageError
from pydetox.repair.task_vectors import TaskVector


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)}
    end = {k: v + torch.randn(v.shape, generator=generator) for k, v in start.items()}
    return ({k: v.to(dtype) for k, v in d.items()} for d in (start, end))


def test_arithmetic_against_float64():
    start, end = pair()
    vector = TaskVector.between(start, end)
    exact = torch.cat([(end[k].double() - start[k].double()).flatten() for k in start])
    assert vector.norm() == pytest.approx(float(exact.norm()), rel=1e-6)
    other = -2 * vector + vector
    assert vector.dot(other) == pytest.approx(-float(exact.dot(exact)), rel=1e-6)
    assert vector.cosine(other) == pytest.approx(-1)
    assert (vector - vector).norm() == 0


def test_differences_of_half_precision_weights_are_taken_in_float32():
    start, end = pair(torch.bfloat16)
    vector = TaskVector.between(start, end)
    assert all(v.dtype == torch.float32 for v in vector.tensors.values())
    torch.testing.assert_close(vector.tensors["b"], end["b"].float() - start["b"].float())


def test_a_missing_tensor_counts_as_zero():
    left, right = TaskVector({"a": torch.ones(3)}), TaskVector({"b": torch.ones(2)})
    assert (left - right).norm() == pytest.approx(math.sqrt(5))
    torch.testing.assert_close((left - right).tensors["b"], -torch.ones(2))
    assert left.dot(right) == 0


def test_applying_and_taking_back_and_integers_left_alone():
    module = torch.nn.BatchNorm1d(4)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    changed = {k: v + 1 for k, v in before.items()}
    vector = TaskVector.between(before, changed)
    assert "num_batches_tracked" not in vector.tensors
    vector.apply_to(module, 0.5)
    torch.testing.assert_close(module.weight.detach(), before["weight"] + 0.5)
    vector.apply_to(module, -0.5)
    torch.testing.assert_close(module.running_var, before["running_var"])


def test_different_tensors_are_named():
    with pytest.raises(ArchitectureError, match="extra"):
        TaskVector.between({"a": torch.ones(1)}, {"a": torch.ones(1), "extra": torch.ones(1)})
    with pytest.raises(ArchitectureError, match="nothing"):
        TaskVector({"nothing": torch.ones(1)}).apply_to(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="zero"):
        TaskVector({"a": torch.zeros(1)}).cosine(TaskVector({"a": torch.ones(1)}))


# ---- two files ----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    start, end = pair(torch.bfloat16)
    start |= {"big": torch.randn(70001), "steps": torch.tensor(1)}
    end |= {"big": torch.randn(70001), "steps": torch.tensor(2)}
    save_file(start, tmp_path / "start.safetensors")
    torch.save(end, tmp_path / "end.pt")
    return tmp_path / "start.safetensors", tmp_path / "end.pt", TaskVector.between(start, end)


def test_from_checkpoints_is_what_is_between_them(files):
    lazy, eager = TaskVector.from_checkpoints(*files[:2]), files[2]
    assert set(lazy.tensors) == set(eager.tensors) == {"a", "b", "big"}
    for name, value in eager.tensors.items():
        assert torch.equal(lazy.tensors[name], value)
        assert lazy.tensors[name].dtype == value.dtype
    assert "steps" not in lazy.tensors
    with pytest.raises(KeyError):
        lazy.tensors["steps"]
    assert lazy.norm() == eager.norm()
    assert lazy.dot(eager) == eager.dot(eager)
    assert lazy.cosine(-eager) == pytest.approx(-1)


def test_sums_of_vectors_in_files_hold_one_tensor_at_a_time(files):
    lazy, eager = TaskVector.from_checkpoints(*files[:2]), files[2]
    made = []

    class Watched(type(lazy.tensors)):
        def __getitem__(self, name):
            made.append(name)
            return super().__getitem__(name)

    watched = TaskVector(Watched(list(lazy.tensors), lazy.tensors.__getitem__))
    combined = 2 * watched - eager
    assert not made
    assert "a" in combined.tensors
    assert torch.equal(combined.tensors["a"], 2 * eager.tensors["a"] - eager.tensors["a"])
    assert made == ["a"]
    exact = torch.cat([v.double().flatten() for v in eager.tensors.values()]).norm()
    assert combined.norm() == pytest.approx(float(exact), rel=1e-6)


def test_a_vector_in_files_applies(files):
    lazy = TaskVector.from_checkpoints(*files[:2])
    module = torch.nn.Module()
    for name, value in files[2].tensors.items():
        module.register_buffer(name, torch.zeros_like(value))
    lazy.apply_to(module, -0.5)
    assert torch.equal(module.big, -0.5 * files[2].tensors["big"])


def test_files_that_differ_or_change(files, tmp_path):
    save_file({"a": torch.zeros(3, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(ArchitectureError, match=r"end\.pt and .*other\.safetensors: .*'big'"):
        TaskVector.from_checkpoints(files[1], tmp_path / "other.safetensors")
    lazy = TaskVector.from_checkpoints(*files[:2])
    os.truncate(files[0], 1000)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        lazy.norm()


def test_dot_products_are_in_float64():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200_001, generator=generator) for _ in range(2))
    exact = float(x.double() @ y.double())
    assert TaskVector({"x": x}).dot(TaskVector({"x": y})) == pytest.approx(exact, rel=1e-12)
    transposed = TaskVector({"x": x[:200_000].view(400, 500).T})
    assert transposed.norm() == pytest.approx(float(x[:200_000].double().norm()), rel=1e-12)
    assert TaskVector({"x": torch.zeros(0, 3)}).norm() == 0
