"""Results that BackdoorBench's own code writes; what pydetox reads and writes of them, as JSON.

python results_of_backdoorbench.py CHECKOUT FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, sys.argv[1])

import numpy as np
import torch
import torch._dynamo
import torchvision  # noqa: F401 - before what it imports is replaced
from PIL import Image
from safetensors.torch import load_file

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.models import OpenClipModel

FOLDER = Path(sys.argv[2])
CLASSES = [f"class {k}" for k in range(10)]


def replace_what_is_not_used() -> None:
    """Let BackdoorBench's modules import what nothing here uses."""
    for name in ("pandas", "sklearn", "sklearn.metrics", "matplotlib", "matplotlib.pyplot", "cv2"):
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = MagicMock(name=name)
    sys.modules["utils.bd_dataset"] = MagicMock()


class Images(torch.utils.data.Dataset):
    """Six grey images with labels."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, k: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.full((32, 32, 3), 30 * k, np.uint8)), k


def written(name: str, folder: Path) -> torch.nn.Module:
    """Write the result of an attack as BackdoorBench does, and return its model."""
    from utils.aggregate_block.model_trainer_generate import generate_cls_model
    from utils.bd_dataset_v2 import prepro_cls_DatasetBD_v2
    from utils.save_load_attack import save_attack_result

    torch.manual_seed(0)
    model = generate_cls_model(name, num_classes=10, image_size=32)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 32, 32))  # statistics that are not those of a new model
    attacked = prepro_cls_DatasetBD_v2(
        Images(), poison_indicator=np.zeros(6), save_folder_path=str(folder / "bd")
    )
    save_attack_result(
        model_name=name,
        num_classes=10,
        model=model.state_dict(),
        data_path="data",
        img_size=[32, 32, 3],
        clean_data="cifar10",
        bd_train=attacked,
        bd_test=attacked,
        save_path=str(folder),
    )
    return model.eval()


def examined(name: str) -> dict[str, Any]:
    from utils.aggregate_block.model_trainer_generate import generate_cls_model

    folder = FOLDER / name
    folder.mkdir()
    theirs = written(name, folder)
    ours = OpenClipModel.from_checkpoint(load_checkpoint(folder / "attack_result.pt"))
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ours.normalize(pixels))
        found = ours.encode_pixels(pixels) @ ours.zero_shot_head(CLASSES, ["{c}"]).T
    save_checkpoint(
        folder / "written",
        ours.storage_state_dict(),
        model_config=ours.model_config,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    again = generate_cls_model(name, num_classes=10, image_size=32)
    again.load_state_dict(load_file(folder / "written" / "open_clip_model.safetensors"))
    with torch.no_grad():
        back = again.eval()(ours.normalize(pixels))
    cosine = torch.nn.functional.cosine_similarity(
        expected.flatten().double(), found.flatten().double(), dim=0
    )
    return {
        "cosine": float(cosine),
        "equal bits": torch.equal(back, expected),
        "warnings": list(ours.warnings),
    }


if __name__ == "__main__":
    replace_what_is_not_used()
    found = {name: examined(name) for name in ("preactresnet18", "vgg19", "resnet18")}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
