"""The callback in a training of transformers' own Trainer."""

from __future__ import annotations

import json

import pytest


def test_the_callback_scans_each_epoch_and_changes_no_training(peer, tmp_path):
    found = json.loads(peer("trainer_of_transformers.py", tmp_path).splitlines()[-1])
    assert found["epochs"] == [1, 2]
    assert found["same_training"]
    assert len(found["checkpoints"]) == 2
    # The Trainer's checkpoint-N folders are the models that were scanned.
    for scanned, saved in zip(found["sizes"], found["checkpoints"], strict=True):
        assert scanned == pytest.approx(saved, rel=1e-4)
