"""Run with transformers on the path: open_clip's architectures with its text towers, without a hub.

python towers_of_transformers.py FOLDER    writes what was found to FOLDER/found.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import torch

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.checkpoints.architecture import named_config
from pydetox.models import OpenClipModel, hub_towers
from pydetox.models.catalogue import listed_models
from pydetox.research.cut_models import shortened


def parameters() -> dict[str, int]:
    """Return the number of weights of every architecture with such a tower, none of them made."""
    found = {}
    for one in listed_models():
        config = named_config(one.name)
        if config["text_cfg"].get("hf_model_name"):
            with torch.device("meta"):
                model = OpenClipModel.from_config(config, seed=0)
            assert type(model.clip) in (open_clip.CustomTextCLIP, open_clip.CoCa)
            found[one.name] = sum(p.numel() for p in model.clip.text.parameters())
    return found


def round_trip(folder: Path) -> dict[str, float]:
    """Write and read a tiny one of each kind, and compare texts with the first model's."""
    found = {}
    for name in ("coca_roberta-ViT-B-32", "nllb-clip-base"):
        config = shortened(named_config(name))
        tower = dict(hub_towers.CONFIGURATIONS[config["text_cfg"]["hf_model_name"]])
        hub_towers.CONFIGURATIONS["tiny/tower"] = tower | {"vocab_size": 90}
        config["text_cfg"]["hf_model_name"] = "tiny/tower"
        config["vision_cfg"] |= {"width": 64, "image_size": 32}
        first = OpenClipModel.from_config(config, seed=0)
        save_checkpoint(
            folder / name,
            first.storage_state_dict(),
            model_config=config,
            preprocess_config=None,
            provenance=Provenance(method="test"),
        )
        second = OpenClipModel.from_checkpoint(load_checkpoint(folder / name))
        tokens = torch.randint(2, 90, (3, 20), generator=torch.Generator().manual_seed(0))
        tokens[1, 9:] = first.clip.text.config.pad_token_id
        with torch.no_grad():
            texts = [one.encode_tokens(tokens) for one in (first, second)]
        found[name] = float((texts[0] - texts[1]).abs().max())
        assert float(texts[0].std()) > 0
    return found


if __name__ == "__main__":
    where = Path(sys.argv[1])
    content = {"parameters": parameters(), "round trip": round_trip(where)}
    (where / "found.json").write_text(json.dumps(content))
