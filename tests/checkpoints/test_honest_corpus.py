"""Harmless files: read without a finding that nobody needs, and as torch reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pydetox.checkpoints import inspect_checkpoint, load_checkpoint
from pydetox.errors import CheckpointError, UnsafeCheckpointError
from tests.checkpoints.differential import difference, theirs
from tests.checkpoints.honest_corpus import HONEST, WEIGHTS, Honest, saved
from tests.checkpoints.hostile_corpus import CORPUS, MAX_PEAK_MIB, MAX_SECONDS, measure


@pytest.mark.parametrize("case", HONEST, ids=lambda case: case.name)
def test_honest_file(tmp_path: Path, case: Honest) -> None:
    path = case.build(tmp_path)
    outcome = measure(path)
    assert outcome.peak_mib <= MAX_PEAK_MIB
    assert outcome.cpu_seconds <= MAX_SECONDS
    if case.refused is not None:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, model="ViT-B-32")
        assert case.refused in str(caught.value)
        assert not isinstance(caught.value, UnsafeCheckpointError)
        return
    checkpoint = load_checkpoint(path, model="ViT-B-32")
    assert {finding.rule for finding in checkpoint.findings} == case.rules
    if case.suffix == ".pt" and not case.rules:
        others = [
            difference(checkpoint.state_dict, other)
            for _, other in theirs(path.read_bytes(), tmp_path / "b.pt")
        ]
        assert set(others) <= {None}


def test_the_corpora_are_large() -> None:
    assert len({case.name for case in HONEST}) == len(HONEST) >= 100
    assert len(HONEST) + len(CORPUS) >= 200
    assert sum(case.refused is not None for case in HONEST) <= 3


def test_the_key_of_the_weights_is_said_and_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    averaged = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    path.write_bytes(saved({"model": WEIGHTS, "nested": {"ema": averaged}}))
    found = inspect_checkpoint(path)
    assert found.weights_key == "model"
    (finding,) = found.findings
    assert finding.rule == "several-weights"
    assert "'nested/ema'" in finding.message
    chosen = load_checkpoint(path, model="ViT-B-32", weights_key="nested/ema")
    (note,) = chosen.findings
    assert note.rule == "chosen-weights"
    assert "'nested/ema' is read, as it was asked for; 'model' has other values" in note.message
    assert torch.equal(chosen.state_dict["a"], averaged["a"])
    with pytest.raises(CheckpointError, match=r"no tensors under 'x'; there are tensors under 'mo"):
        load_checkpoint(path, model="ViT-B-32", weights_key="x")
    path.write_bytes(saved({"g": WEIGHTS, "d": averaged}))
    with pytest.raises(CheckpointError, match=r"2 sets of weights.*'g' \(2\), 'd' \(2\): name one"):
        load_checkpoint(path, model="ViT-B-32")
