"""LoRA adapters of peft: merged as its formula says, and others refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from pydetox.checkpoints import convert_checkpoint
from pydetox.checkpoints.adapters import adapter_scale, merge_adapter
from pydetox.cli import cli
from pydetox.errors import ArchitectureError, UsageError

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "org/base",
}
NAME = "vision_model.encoder.layers.0.self_attn.q_proj"


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of an adapter, and that of its base."""
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file(
        {
            f"base_model.model.{NAME}.lora_A.weight": random(4, 6, seed=1),
            f"base_model.model.{NAME}.lora_B.weight": random(10, 4, seed=2),
        },
        adapter / "adapter_model.safetensors",
    )
    safetensors.torch.save_file(
        {f"{NAME}.weight": random(10, 6, seed=3), f"{NAME}.bias": random(10, seed=4)},
        base / "model.safetensors",
    )
    return adapter, base


def test_an_adapter_is_merged_into_its_base(folders, tmp_path):
    adapter, base = folders
    result = CliRunner().invoke(
        cli, ["convert", str(adapter), str(tmp_path / "out.safetensors"), "--base", str(base)]
    )
    assert result.exit_code == 0, result.output
    merged = safetensors.torch.load_file(tmp_path / "out.safetensors")
    weight, down, up = (random(*s, seed=k) for s, k in (((10, 6), 3), ((4, 6), 1), ((10, 4), 2)))
    expected = weight.double() + 8 / 4 * up.double() @ down.double()
    torch.testing.assert_close(merged[f"{NAME}.weight"].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged[f"{NAME}.bias"], random(10, seed=4))
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert '"base_sha256"' in file.metadata()["pydetox"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_base_keeps_its_dtype(dtype):
    adapter = {f"x.lora_A.{k}weight": random(2, 3, seed=1) for k in ("",)}
    adapter |= {"x.lora_B.weight": random(5, 2, seed=2)}
    base = {"x.weight": random(5, 3, seed=3, dtype=dtype)}
    found = merge_adapter(adapter, base, 0.5)["x.weight"]
    assert found.dtype == dtype
    exact = base["x.weight"].double()
    exact = exact + 0.5 * adapter["x.lora_B.weight"].double() @ adapter["x.lora_A.weight"].double()
    torch.testing.assert_close(found.double(), exact.to(dtype).double(), atol=1e-6, rtol=1e-2)


def test_rank_stabilised_lora_has_another_factor(folders):
    adapter, _ = folders
    assert adapter_scale(adapter) == 2.0
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | {"use_rslora": True}))
    assert adapter_scale(adapter) == 8 / math.sqrt(4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"use_dora": True}, "use_dora = 'True'; expected plain LoRA"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 0}, "r = '0'"),
        ({"lora_alpha": None}, "lora_alpha = 'None'"),
    ],
)
def test_what_is_not_plain_lora_is_refused(folders, tmp_path, change, words):
    adapter, base = folders
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ArchitectureError, match=words):
        convert_checkpoint(adapter, tmp_path / "out.safetensors", base=base)
    assert not (tmp_path / "out.safetensors").exists()


def test_tensors_that_do_not_fit_are_refused(folders, tmp_path):
    adapter, _ = folders
    good = {"x.lora_A.weight": torch.zeros(2, 3), "x.lora_B.weight": torch.zeros(5, 2)}
    weight = {"x.weight": torch.zeros(5, 3)}
    for change, target, words in (
        ({"x.lora_magnitude_vector.weight": torch.zeros(5)}, weight, "expected only lora_A"),
        ({"x.lora_A.weight": torch.zeros(2, 4)}, weight, r"expected A \[r, in\]"),
        ({"y.lora_A.weight": torch.zeros(2, 3)}, weight, "no tensor 'y.weight'"),
        ({}, {"x.weight": torch.zeros(5, 3, 1, 1)}, r"expected A \[r, in\]"),
    ):
        with pytest.raises(ArchitectureError, match=words):
            merge_adapter(good | change, target, 1.0)
    with pytest.raises(ArchitectureError, match="holds no tensors"):
        merge_adapter({}, weight, 1.0)
    with pytest.raises(UsageError, match="as base="):
        convert_checkpoint(adapter, tmp_path / "out.safetensors", base="hf-hub:org/base")
