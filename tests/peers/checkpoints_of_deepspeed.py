"""Run with deepspeed on the path: its checkpoints of all stages, what pydetox reads, as JSON.

python checkpoints_of_deepspeed.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# One process on a CPU, without a compiled part of deepspeed's.
os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import deepspeed.comm.torch
import open_clip
import torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.errors import PydetoxError
from pydetox.models import OpenClipModel
from tests.mini import MINI_CONFIG

FOLDER = Path(sys.argv[1])
CONFIG = FOLDER / "mini.json"


def train(stage: int) -> Any:
    """Return an engine after one step; deepspeed takes no parameters without dimensions."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**MINI_CONFIG, nonscalar_logit_scale=True)
    given = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(clip.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=clip, optimizer=optimizer, config=given)
    return engine


def read(path: Path) -> dict[str, torch.Tensor]:
    return OpenClipModel.from_checkpoint(load_checkpoint(path, model=CONFIG)).storage_state_dict()


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    flat = {name: value.reshape(-1) for name, value in found.items()}
    return flat.keys() == expected.keys() and all(
        torch.equal(flat[name], value.reshape(-1)) for name, value in expected.items()
    )


if __name__ == "__main__":
    CONFIG.write_text(json.dumps(MINI_CONFIG))
    deepspeed.comm.torch.build_shm_op = lambda: None
    store = f"file://{FOLDER / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    weights = open_clip.CLIP(**MINI_CONFIG).state_dict()
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        engine, folder = train(stage), FOLDER / f"stage-{stage}"
        engine.save_checkpoint(folder, tag="global_step1")
        if stage == 3:
            (part,) = (folder / "global_step1").glob("*_model_states.pt")
            try:
                read(part)
            except PydetoxError as error:
                found["divided"] = str(error)
            convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(FOLDER / "joined"))
            found["joined"] = equal(read(FOLDER / "joined"), weights)
            continue
        found[f"stage {stage}"] = equal(read(folder / "global_step1"), weights)
        if stage == 1:
            whole = read(folder / "global_step1")
            changed = {name: value + 1 for name, value in whole.items()}
            save_checkpoint(
                FOLDER / "written",
                changed,
                model_config=MINI_CONFIG,
                preprocess_config=None,
                provenance=Provenance(method="test"),
            )
            inner = engine.module
            open_clip.factory.load_checkpoint(
                inner, str(FOLDER / "written" / "open_clip_model.safetensors")
            )
            found["written"] = equal(inner.state_dict(), changed)
    sys.stdout.write(f"\n{json.dumps(found)}\n")
