"""open_clip's architectures with text towers of transformers, built without the hub."""

from __future__ import annotations

import json

#: Of the repositories on the hub: embeddings and encoder, without a decoder.
MILLIONS = {
    "roberta-ViT-B-32": 124.6,
    "xlm-roberta-base-ViT-B-32": 278.0,
    "xlm-roberta-large-ViT-H-14": 559.9,
    "mt5-base-ViT-B-32": 277.0,
    "nllb-clip-base": 414.0,
}


def test_text_towers_of_transformers(peer, tmp_path):
    peer("towers_of_transformers.py", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["parameters"]) == 10
    for name, millions in MILLIONS.items():
        assert abs(found["parameters"][name] / 1e6 - millions) < 0.02 * millions, name
    assert len(found["round trip"]) == 2
    assert all(difference == 0 for difference in found["round trip"].values())
