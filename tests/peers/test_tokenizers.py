"""Models whose texts another tokenizer than CLIP's reads: equal to open_clip's, both ways."""

from __future__ import annotations

import json


def test_a_tokenizer_beside_the_weights(peer, tmp_path):
    peer("tokenizer_of_the_hub.py", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["equal"]
    assert found["texts"]
    assert found["written back"]
    assert found["head"] == [2, 16]
    # <pad> is 0, </s> 1, and the words follow from 3: canonical text has no capitals and no dots.
    assert found["tokens"][0] == [3, 4, 5, 3, 6, 1, 0, 0]
    assert found["without"].startswith("ArchitectureError: ")
    assert "`hf download nobody/has-this`" in found["without"]
