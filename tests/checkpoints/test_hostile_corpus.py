"""The corpus: each refused for its reason or read with a finding, fast, in little memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.checkpoints.deceptive_corpus import DECEPTIVE
from tests.checkpoints.hostile_corpus import CORPUS, MAX_PEAK_MIB, MAX_SECONDS, Hostile, measure


@pytest.mark.parametrize("case", [*CORPUS, *DECEPTIVE], ids=lambda case: case.name)
def test_hostile_file(tmp_path: Path, case: Hostile) -> None:
    path = case.build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = measure(path)
    if case.error is None:
        assert outcome.error is None
        assert case.expected in outcome.rules
    else:
        assert type(outcome.error) is case.error, outcome.error
        message = str(outcome.error)
        assert re.search(case.expected, message), message
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
    assert outcome.peak_mib <= MAX_PEAK_MIB
    assert outcome.cpu_seconds <= MAX_SECONDS  # the wall time is that of whatever else runs here
    assert sorted(tmp_path.rglob("*")) == before


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in [*CORPUS, *DECEPTIVE]}) == len(CORPUS) + len(DECEPTIVE)
    assert sum(case.error is not None for case in CORPUS) >= 40
