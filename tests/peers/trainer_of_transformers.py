"""Train a tiny CLIPModel with transformers' Trainer and a ScanCallback; print the result as JSON.

python trainer_of_transformers.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # beside the tests, not a release

import pydetox
from pydetox import InversionConfig, ScanConfig
from pydetox.checkpoints import load_checkpoint
from pydetox.compat import ScanCallback
from pydetox.data import ImageSet
from pydetox.models import OpenClipModel

PART = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
images = torch.randint(0, 256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(0))
DATA = ImageSet(images.to(torch.uint8), torch.arange(16) % 2, ("cat", "dog"), "noise")
SEARCH = ScanConfig(families=("patch",), inversion=InversionConfig(steps=3, batch_size=4))


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.tensor([49406, 100 + int(DATA.labels[index]), 49407])
        return {"input_ids": tokens, "pixel_values": DATA.images[index].float() / 255}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    batch: dict[str, object] = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    return batch | {"return_loss": True}


def train(folder: Path, callbacks: list[object]) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            vision_config={**PART, "image_size": 16, "patch_size": 8},
            text_config={**PART, "max_position_embeddings": 16},
            projection_dim=16,
        )
    )
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    Trainer(
        model, arguments, data_collator=collate, train_dataset=Pairs(), callbacks=callbacks
    ).train()
    return model


where = Path(sys.argv[1])
callback = ScanCallback(DATA, config=SEARCH)
scanned = train(where / "scanned", [callback]).state_dict()
plain = train(where / "plain", []).state_dict()
lines = (where / "scanned" / "scans.jsonl").read_text().splitlines()
checkpoints = sorted((where / "scanned").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
sizes = []
for path in checkpoints:
    read = load_checkpoint(path, preprocess={"mean": MEAN, "std": STD})
    found = pydetox.scan(OpenClipModel.from_checkpoint(read), DATA, config=SEARCH)
    sizes.append(list(found.detection.p_l1))
sys.stdout.write(
    "\n"
    + json.dumps(
        {
            "epochs": [json.loads(line)["epoch"] for line in lines],
            "sizes": [list(found.detection.p_l1) for _, found in callback.results],
            "checkpoints": sizes,
            "same_training": all(torch.equal(plain[k], v) for k, v in scanned.items()),
        }
    )
)
