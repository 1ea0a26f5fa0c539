"""Checkpoints written by the libraries that made the formats."""

from __future__ import annotations

import json

import pytest

NEEDED = ("pytorch_lightning", "lightning_fabric", "torchmetrics", "accelerate", "peft")
KINDS = {
    "lightning": ("model", "clip"),
    "torch": ("compile", "data parallel", "data parallel, compiled", "averaged"),
    "distributed": ("ddp", "fsdp", "fsdp2"),
    "accelerate": ("model", "state"),
    "timm": ("state_dict", "state_dict_ema"),
}


@pytest.fixture(scope="module")
def found(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return json.loads(peer("checkpoints_of_others.py", folder, needs=NEEDED).splitlines()[-1])


@pytest.mark.parametrize("library", KINDS)
def test_the_weights_of_a_training_are_read_as_they_were(found, library):
    assert tuple(found[library]) == KINDS[library]
    for name, one in found[library].items():
        assert one["equal"], name
        assert one["names"] == [], name
        if library == "lightning":
            assert "2 tensors beside the model are left out" in one["warnings"][0]
            assert "head.weight" in one["warnings"][0]
        else:
            assert one["warnings"] == [], name


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_adapters_of_peft_both_ways(found, kind):
    adapters = found["peft"]
    assert adapters[f"{kind}, plain"] <= 1e-7
    assert adapters[f"{kind}, rslora"] <= 1e-7
    assert adapters[f"{kind}, written"] < 1e-5
    assert "has rank_pattern" in adapters[f"{kind}, patterns"]
    assert "merge it with peft" in adapters[f"{kind}, patterns"]
    assert "has bias = 'lora_only'" in adapters[f"{kind}, biases"]
