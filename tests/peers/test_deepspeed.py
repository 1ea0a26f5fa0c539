"""Checkpoints that deepspeed's own engine writes.

`make peers` does not install deepspeed, which is built from source. With `pip install --no-deps
--no-build-isolation --target FOLDER` of the packages below into its folder, this test runs.
"""

from __future__ import annotations

import json


def test_every_stage_is_read_and_a_divided_one_says_how_to_join_it(peer, tmp_path):
    needed = ("deepspeed", "hjson", "einops", "msgpack", "cpuinfo", "pydantic", "psutil")
    found = json.loads(peer("checkpoints_of_deepspeed.py", tmp_path, needs=needed).splitlines()[-1])
    assert "zero_to_fp32.py . joined" in found.pop("divided")
    assert found == {
        "stage 0": True,
        "stage 1": True,
        "stage 2": True,
        "written": True,
        "joined": True,
    }
