"""LoRA adapters of peft: merged as its formula says, and others refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from pydetox.checkpoints import Provenance, convert_checkpoint
from pydetox.checkpoints.adapter_writing import make_adapter, save_adapter
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
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        *(
            ({"init_lora_weights": way}, f"init_lora_weights = '{way}'; expected plain LoRA")
            for way in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq")
        ),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora = 'True'"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
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


@pytest.mark.parametrize("way", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_ways_to_begin_that_leave_the_base_alone_are_plain(folders, way):
    adapter, _ = folders
    change = {"init_lora_weights": way, "loftq_config": {}, "kasa_config": None}
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | change))
    assert adapter_scale(adapter) == 2.0


def test_tensors_that_do_not_fit_are_refused(folders, tmp_path):
    adapter, _ = folders
    good = {"x.lora_A.weight": torch.zeros(2, 3), "x.lora_B.weight": torch.zeros(5, 2)}
    weight = {"x.weight": torch.zeros(5, 3)}
    for change, target, words in (
        ({"x.lora_magnitude_vector.weight": torch.zeros(5)}, weight, "expected lora_A and lora_B"),
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


LAYER = "vision_model.encoder.layers.0"
SHAPES = {
    "logit_scale": (),
    "text_model.encoder.layers.0.mlp.fc1.weight": (5, 6),
    "vision_model.embeddings.class_embedding": (6,),
    "vision_model.embeddings.position_embedding.weight": (4, 6),
    f"{LAYER}.self_attn.q_proj.weight": (6, 6),
    f"{LAYER}.self_attn.q_proj.bias": (6,),
    f"{LAYER}.mlp.fc1.weight": (12, 6),
    f"{LAYER}.mlp.fc1.bias": (12,),
    f"{LAYER}.layer_norm1.weight": (6,),
    f"{LAYER}.layer_norm1.bias": (6,),
    "visual_projection.weight": (3, 6),
}


def two_models() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model, and the same with another image tower."""
    before = {k: random(*shape, seed=n) for n, (k, shape) in enumerate(SHAPES.items())}
    after = {
        k: v + 0.1 * random(*v.shape, seed=50 + n) if k.startswith("vis") else v.clone()
        for n, (k, v) in enumerate(before.items())
    }
    return before, after


def peft_merged(
    adapter: dict[str, torch.Tensor], config: dict, base: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What peft computes, in float64: W + (alpha / r) B A, and modules that are stored."""
    merged = {k: v.double() for k, v in base.items()}
    for module in config["target_modules"]:
        down = adapter[f"base_model.model.{module}.lora_A.weight"].double()
        up = adapter[f"base_model.model.{module}.lora_B.weight"].double()
        assert down.shape[0] == up.shape[1] == config["r"]
        merged[f"{module}.weight"] += config["lora_alpha"] / config["r"] * up @ down
    for name, value in adapter.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".lora_" not in plain:
            stored = any(plain.startswith(f"{m}.") for m in config["modules_to_save"] or ())
            assert stored or (config["bias"] == "all" and plain.endswith(".bias"))
            merged[plain] = value.double()
    return merged


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_a_change_becomes_an_adapter(tmp_path, rank):
    before, after = two_models()
    made = make_adapter(before, after, rank=rank)
    save_adapter(tmp_path / "a", made, base="org/base", provenance=Provenance(method="test"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    merged = peft_merged(tensors, config, before)
    assert config["base_model_name_or_path"] == "org/base"
    assert "text_model" not in " ".join(tensors)
    assert "vision_model.embeddings" in config["modules_to_save"]
    # The truncated decomposition, written out with other functions.
    energy = total = 0.0
    for name, value in after.items():
        change = value.double() - before[name].double()
        total += float(change.square().sum())
        left = value.double() - merged[name]
        if name.removesuffix(".weight") in config["target_modules"]:
            values = torch.linalg.eigvalsh(change.T @ change).clamp(min=0).flip(0)
            assert float(left.square().sum()) == pytest.approx(float(values[rank:].sum()), abs=1e-6)
            energy += float(values[rank:].sum())
        else:
            torch.testing.assert_close(left, torch.zeros_like(left))
    assert made.error == pytest.approx(math.sqrt(energy / total), abs=1e-4)
    assert (made.error < 1e-5) == (rank == 40)
    ours = merge_adapter(tensors, before, adapter_scale(tmp_path / "a"))
    for name, value in merged.items():
        torch.testing.assert_close(ours[name].double(), value, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_two_folders(tmp_path):
    before, after = two_models()
    for name, state in (("base", before), ("repaired", after)):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(state, tmp_path / name / "model.safetensors")
    base, repaired, out = (str(tmp_path / name) for name in ("base", "repaired", "out"))
    options = ["--output-format", "lora", "--lora-rank", "40"]
    result = CliRunner().invoke(cli, ["convert", repaired, out, "--base", base, *options])
    assert result.exit_code == 0, result.output
    assert "rank 40 leaves out 0" in result.stderr
    back = str(tmp_path / "back.safetensors")
    result = CliRunner().invoke(cli, ["convert", out, back, "--base", base])
    assert result.exit_code == 0, result.output
    for name, value in safetensors.torch.load_file(back).items():
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=1e-5)
    for arguments, words in (
        ([repaired, out + "2", "--output-format", "lora"], "needs --base"),
        ([repaired, out + "2", "--base", base, "--lora-rank", "3"], "needs --output-format lora"),
        ([repaired, out, "--base", base, *options], "exists already"),
    ):
        result = CliRunner().invoke(cli, ["convert", *arguments])
        assert result.exit_code in (2, 4)
        assert words in result.stderr


def test_what_has_no_form_as_an_adapter():
    before, after = two_models()
    with pytest.raises(UsageError, match="no change"):
        make_adapter(before, dict(before))
    with pytest.raises(UsageError, match="rank is 0"):
        make_adapter(before, after, rank=0)
    with pytest.raises(ArchitectureError, match="in one of the two"):
        make_adapter(before, after | {"x": torch.zeros(1)})
    with pytest.raises(ArchitectureError, match=r"is \[\] and \[2\]"):
        make_adapter(before, after | {"logit_scale": torch.zeros(2)})
    with pytest.raises(ArchitectureError, match="no linear layer differs"):
        make_adapter(before, before | {"logit_scale": torch.zeros(())})
