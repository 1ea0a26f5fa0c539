import math

import pytest
import torch

from pydetox.errors import ArchitectureError, UsageError
from pydetox.task_vectors import TaskVector


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
