"""Results of BackdoorBench, written and read again by its own code.

It is no package: PYDETOX_BACKDOORBENCH names a clone of github.com/SCLBD/BackdoorBench. Without
one, this test is skipped, and tests/models/test_classifiers.py reads a result of the same entries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("PYDETOX_BACKDOORBENCH")


@pytest.mark.skipif(CHECKOUT is None, reason="PYDETOX_BACKDOORBENCH names no clone")
def test_a_result_is_read_as_it_was_written_and_goes_back(tmp_path):
    script = Path(__file__).with_name("results_of_backdoorbench.py")
    result = subprocess.run(
        [sys.executable, script, str(CHECKOUT), tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found) == {"preactresnet18", "vgg19", "resnet18"}
    for name, one in found.items():
        assert one["cosine"] > 1 - 1e-6, name  # the logits, up to a factor for all classes
        assert one["equal bits"], name
        assert one["warnings"] == [], name
