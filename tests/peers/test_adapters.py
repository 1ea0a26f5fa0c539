"""Adapters of peft: they become what peft makes of them, or are refused."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from pydetox.checkpoints import convert_checkpoint
from pydetox.errors import ArchitectureError

#: Ways to begin a training; the last three change the base whenever an adapter is loaded.
WAYS = ("True", "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora")


def test_an_adapter_is_merged_as_peft_merges_it_or_refused(peer, tmp_path):
    folder = tmp_path / "made"
    peer("adapters_of_peft.py", folder, *WAYS, needs=("peft",))
    base = load_file(folder / "base.safetensors")
    refused = []
    for way in WAYS:
        theirs = load_file(folder / f"{way}.safetensors")
        assert any(not torch.equal(theirs[name], base[name]) for name in base)
        out = tmp_path / f"{way}.safetensors"
        try:
            convert_checkpoint(folder / way, out, base=folder / "base.safetensors")
        except ArchitectureError as error:
            assert f"init_lora_weights = '{way}'; expected plain LoRA" in str(error)
            refused.append(way)
            continue
        ours = load_file(out)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)
    assert refused == ["pissa", "pissa_niter_4", "olora"]
