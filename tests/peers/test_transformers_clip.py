"""CLIPModel folders: transformers itself says what their weights compute."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pydetox.checkpoints import Checkpoint
from pydetox.checkpoints.transformers_clip import (
    to_model_config,
    to_open_clip,
    to_transformers,
)
from pydetox.models import OpenClipModel


def tokens() -> np.ndarray:
    """Three texts: one short, one with the next-to-last token in it, one that fills all places."""
    result = np.zeros((3, 16), dtype=np.int64)
    result[:, 0] = 49406
    result[0, 1:3] = [320, 49407]
    result[1, 1:5] = [5, 49405, 7, 49407]
    result[2, 1:] = [*range(3, 17), 49407]
    return result


@pytest.mark.parametrize("variant", ["quick-gelu", "gelu", "tanh"])
def test_both_towers_compute_what_transformers_computes(peer, tmp_path, variant):
    peer("clip_of_transformers.py", "make", tmp_path, variant)
    state = load_file(tmp_path / "model.safetensors")
    config = to_model_config(json.loads((tmp_path / "config.json").read_text()))
    converted = to_open_clip(state, config)
    model = OpenClipModel.from_checkpoint(
        Checkpoint(converted, config, None, variant, tmp_path, "", "safetensors")
    )
    images = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "in.npz", images=images, tokens=tokens())
    said = json.loads(peer("clip_of_transformers.py", "embed", tmp_path))
    theirs = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        ours = model.encode_normalized(torch.from_numpy(images))  # the tower of a search
        texts = model.encode_tokens(torch.from_numpy(tokens()))
    np.testing.assert_allclose(ours, theirs["images"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(texts, theirs["texts"], atol=1e-5, rtol=0)
    assert model.logit_scale == pytest.approx(said["scale"])

    back = to_transformers(model.storage_state_dict(), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
