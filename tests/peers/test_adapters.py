"""Adapters of peft: they become what peft makes of them, or are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pydetox.checkpoints import convert_checkpoint
from pydetox.errors import ArchitectureError

#: Ways to begin a training. The others change the base whenever an adapter is loaded.
PLAIN = ("True", "gaussian", "eva", "orthogonal", "mica")
OTHERS = ("pissa", "pissa_niter_4", "olora")


def test_an_adapter_is_merged_as_peft_merges_it_or_refused(peer, tmp_path):
    folder, out = tmp_path / "made", tmp_path / "out.safetensors"
    peer("adapters_of_peft.py", folder, *PLAIN, *OTHERS, needs=("peft",))
    base = folder / "base.safetensors"
    for way in PLAIN:
        theirs = load_file(folder / f"{way}.safetensors")
        convert_checkpoint(folder / way, out, base=base, overwrite=True)
        ours, before = load_file(out), load_file(base)
        assert ours.keys() == theirs.keys()
        assert not all(torch.equal(theirs[name], before[name]) for name in before)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)
    for way in OTHERS:
        with pytest.raises(ArchitectureError, match=f"init_lora_weights = '{way}'; expected plain"):
            convert_checkpoint(folder / way, out, base=base, overwrite=True)
