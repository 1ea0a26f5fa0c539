"""Task vectors with task_vectors' interface, recipes as mergekit's, and the Trainer's callback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pydetox import ScanConfig
from pydetox.compat import ScanCallback, TaskVector, merge
from pydetox.errors import ArchitectureError, DataError, OutputError, PydetoxWarning, UsageError
from pydetox.inversion import InversionConfig
from tests.mini import CLASS_NAMES, mini_images, mini_model

State = dict[str, Tensor]


def weights(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator).to(dtype),
        "b": torch.randn(7, generator=generator).to(dtype),
        "count": torch.tensor(seed),
    }


def saved(path: Path, state: State) -> Path:
    save_file(state, path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path / f"{k}.safetensors", weights(k)) for k in range(3)]


def original(start: State, finetuned: State) -> State:
    """What task_vectors computes."""
    return {k: finetuned[k] - start[k] for k in start if start[k].dtype != torch.int64}


def equal(found: Any, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], v) for k, v in expected.items()
    )


def test_the_arithmetic_is_that_of_the_original_bit_for_bit(files: list[Path]) -> None:
    base, first, second = (weights(k) for k in range(3))
    a, b = original(base, first), original(base, second)
    for one, other in (
        (TaskVector(files[0], files[1]), TaskVector(files[0], files[2])),
        (TaskVector(base, first), TaskVector(str(files[0]), files[2])),
        (TaskVector(vector=a), TaskVector(vector=b)),
    ):
        assert equal(one.vector, a)
        assert equal((one + other).vector, {k: a[k] + b[k] for k in a})
        assert equal((one - other).vector, {k: a[k] - b[k] for k in a})
        assert equal((-one).vector, {k: -a[k] for k in a})
        assert equal((0.3 * one).vector, {k: a[k] * 0.3 for k in a})
        assert equal(sum([one, other]).vector, {k: a[k] + b[k] for k in a})  # type: ignore[union-attr]
        applied = one.apply_to(files[0], scaling_coef=0.7)
        expected = {k: base[k] + 0.7 * a[k] for k in a} | {"count": base["count"]}
        assert equal(applied, expected)


def test_a_file_is_written_tensor_by_tensor_and_a_module_is_copied(
    files: list[Path], tmp_path: Path
) -> None:
    vector = TaskVector(files[0], files[1])
    output = tmp_path / "out.safetensors"
    assert vector.apply_to(files[0], -0.5, output=output) == output
    assert equal(load_file(output), vector.apply_to(weights(0), -0.5))  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="exists"):
        vector.apply_to(files[0], 1.0, output=output)
    module = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    made = TaskVector(vector={k: torch.ones_like(v) for k, v in before.items()}).apply_to(module, 2)
    assert isinstance(made, nn.Linear)
    assert equal(made.state_dict(), {k: v + 2 for k, v in before.items()})
    assert equal(module.state_dict(), before)


def test_half_precision_is_computed_wide_and_rounded_once(tmp_path: Path) -> None:
    base, tuned = (weights(k, torch.float16) for k in range(2))
    path = saved(tmp_path / "a.safetensors", base)
    applied = TaskVector(path, saved(tmp_path / "b.safetensors", tuned)).apply_to(path, 0.3)
    assert isinstance(applied, dict)
    exact = base["a"].double() + 0.3 * (tuned["a"].double() - base["a"].double())
    assert applied["a"].dtype == torch.float16
    assert (applied["a"].double() - exact).abs().max() <= (exact.abs() * 2**-11).max()


def test_vectors_that_do_not_fit(files: list[Path]) -> None:
    vector = TaskVector(files[0], files[1])
    with pytest.warns(PydetoxWarning, match="1 tensors are in one of two"):
        both = vector + TaskVector(vector={"a": torch.ones(3, 5)})
    assert list(both.vector) == ["a"]
    with pytest.warns(PydetoxWarning, match=r"1 tensors are not in the task vector .*\(b\)"):
        applied = both.apply_to(files[0])
    assert torch.equal(applied["b"], weights(0)["b"])  # type: ignore[index]
    with pytest.raises(ArchitectureError, match="no tensor 'x'"):
        TaskVector(vector={"x": torch.ones(1)}).apply_to(files[0])
    with pytest.raises(ArchitectureError, match=r"shape \[1\] in the task vector"):
        TaskVector(vector={"a": torch.ones(1)}).apply_to(files[0])
    for given in (
        {},
        {"pretrained_checkpoint": files[0]},
        {"vector": {}, "finetuned_checkpoint": 1},
    ):
        with pytest.raises(UsageError, match="give"):
            TaskVector(**given)  # type: ignore[arg-type]


def test_what_is_no_vector_and_no_number(files: list[Path]) -> None:
    vector: Any = TaskVector(files[0], files[1])
    for wrong in (
        lambda: vector - 1,
        lambda: 1 - vector,
        lambda: vector + 1,
        lambda: 1 + vector,
        lambda: vector + {"a": 1},
    ):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    for factor in ("0.3", math.nan, math.inf, None, True, torch.ones(2)):
        with pytest.raises(UsageError, match=r"scaling_coef is .*; expected a finite number"):
            vector.apply_to(files[0], scaling_coef=factor)
        with pytest.raises(UsageError, match="the factor of a task vector is"):
            vector * factor
    applied = vector.apply_to(files[0], 0.5)
    for factor in (np.float32(0.5), torch.tensor(0.5)):
        assert equal(vector.apply_to(files[0], factor), applied)


VECTOR = {"vector": "v.safetensors", "parameters": {"weight": 1}}


def test_a_recipe_of_mergekit(files: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\n"
        "base_model: 0.safetensors\n"
        "models:\n"
        "  - model: 0.safetensors\n"
        "  - model: 1.safetensors\n"
        "    parameters: {weight: 0.5}\n"
        "  - model: 2.safetensors\n"
        "    parameters: {weight: 1.5}\n"
        "parameters: {normalize: true, lambda: 0.8}\n"
    )
    found = load_file(merge(recipe, tmp_path / "out.safetensors"))
    base, first, second = ({k: v.double() for k, v in weights(n).items()} for n in range(3))
    for name in ("a", "b"):
        change = 0.5 * (first[name] - base[name]) + 1.5 * (second[name] - base[name])
        exact = base[name] + 0.8 * change / 2
        torch.testing.assert_close(found[name].double(), exact, atol=1e-6, rtol=0)
    vector = saved(tmp_path / "trigger.safetensors", original(weights(0), weights(1)))
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(files[1]),
        "models": [{"vector": str(vector), "parameters": {"weight": -1}}],
    }
    found = load_file(merge(content, tmp_path / "clean.safetensors"))
    torch.testing.assert_close(found["a"], weights(0)["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "ties"}, "merge_method is 'ties'"),
        ({"slices": []}, "'slices' is not known"),
        ({"dtype": "float16"}, "dtype is set"),
        ({"models": []}, "no models"),
        ({"models": [{"model": "x"}]}, r"models\[0\]: no weight"),
        ({"models": [{"model": "x", "parameters": {"density": 1}}]}, "'density' is not known"),
        (
            {"models": [{"model": "x", "parameters": {"weight": [0, 1]}}]},
            r"expected a finite number \(no gradients",
        ),
        ({"base_model": None}, "base_model: expected the name"),
        ({"models": [VECTOR], "parameters": {"normalize": 2}}, "normalize is 2; expected true or"),
        ({"models": [VECTOR], "parameters": {"normalize": "no"}}, "normalize is 'no'"),
        ({"models": [VECTOR], "parameters": {"lambda": math.inf}}, "lambda is inf; expected a fin"),
        (
            {"models": [{"model": "x", "parameters": {"weight": math.nan}}]},
            r"models\[0\]: weight is nan; expected a finite number",
        ),
    ],
)
def test_recipes_that_are_not_run(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "v.safetensors", weights(0))
    monkeypatch.chdir(tmp_path)
    recipe = {"merge_method": "task_arithmetic", "base_model": "y", "models": [], **change}
    with pytest.raises(UsageError, match=message):
        merge(recipe, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_normalize_is_true_for_one_as_in_mergekit(files: list[Path], tmp_path: Path) -> None:
    written = []
    for value in (True, 1, 1.0, False, 0):
        content = {
            "merge_method": "task_arithmetic",
            "base_model": str(files[0]),
            "models": [{"model": str(files[1]), "parameters": {"weight": 0.5}}],
            "parameters": {"normalize": value},
        }
        written.append(load_file(merge(content, tmp_path / f"out{len(written)}.safetensors")))
    assert all(torch.equal(one["a"], written[0]["a"]) for one in written[:3])
    torch.testing.assert_close(written[0]["a"], weights(1)["a"])
    half = (weights(0)["a"] + weights(1)["a"]) / 2
    assert all(torch.allclose(one["a"], half) for one in written[3:])


def test_the_callback_of_a_trainer(tmp_path: Path) -> None:
    config = ScanConfig(inversion=InversionConfig(steps=2, batch_size=2))
    callback = ScanCallback(mini_images(), every=2, class_names=CLASS_NAMES, config=config)
    module = mini_model().clip.train()
    arguments = SimpleNamespace(output_dir=str(tmp_path / "out"))
    control = SimpleNamespace(should_training_stop=False)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for epoch in (1.0, 2.0, 3.0, 4.0):
        state = SimpleNamespace(epoch=epoch, is_world_process_zero=True)
        assert callback.on_epoch_end(arguments, state, control, model=module) is control
    assert torch.equal(torch.rand(3), expected)
    assert module.training
    assert [epoch for epoch, _ in callback.results] == [2, 4]
    lines = (tmp_path / "out" / "scans.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [2, 4]
    assert json.loads(lines[0])["verdict"] == "inconclusive"
    assert not control.should_training_stop
    for wrong in (0, "2", 1.5, True):
        with pytest.raises(UsageError, match=f"every is {wrong!r}; expected a whole number"):
            ScanCallback(mini_images(), every=wrong)  # type: ignore[arg-type]
    for missing in ("nowhere", Path("nowhere"), "cifar10=nowhere", "nowhere/{0..2}.tar"):
        with pytest.raises(DataError, match="nowhere"):
            ScanCallback(missing)
    (tmp_path / "pictures").mkdir()
    for there in ("digits", str(tmp_path / "pictures")):
        assert ScanCallback(there).results == []
