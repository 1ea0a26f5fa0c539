"""Recipes of mergekit: the same files through mergekit itself and through `merge`."""

from __future__ import annotations

import json


def test_recipes_give_what_mergekit_gives(peer, tmp_path):
    output = peer(
        "merges_of_mergekit.py", tmp_path, needs=("mergekit", "immutables", "peft", "transformers")
    )
    found = json.loads(output.splitlines()[-1])
    assert len(found) == 10
    for name, one in found.items():
        assert one["same names"], name
        assert one["same dtypes"], name
        assert one["changed"] > 0.1, name
        if "normalized" in name:  # one division more or less in float32
            assert one["largest difference"] <= 1.2e-7 * one["largest weight"], name
        else:
            assert one["equal tensors"] == one["tensors"], name
