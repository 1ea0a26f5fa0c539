"""Give a CLIPModel of transformers, as an object, to pydetox; print what comes out as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # beside the tests, not a release

import pydetox
from pydetox import InversionConfig, ScanConfig
from pydetox.compat import ScanCallback
from pydetox.data import ImageSet
from pydetox.repair.configuration import UnlearnConfig

part = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
config = CLIPConfig(
    vision_config={**part, "image_size": 16, "patch_size": 8},
    text_config={**part, "max_position_embeddings": 16},
    projection_dim=16,
)
torch.manual_seed(0)
module = CLIPModel(config).eval()
before = {key: value.clone() for key, value in module.state_dict().items()}
images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8)
data = ImageSet(images, torch.arange(24) % 3, ("cat", "dog", "owl"), "noise")
search = ScanConfig(inversion=InversionConfig(steps=3, batch_size=4))

model = pydetox.as_model(module)
with torch.no_grad():
    pixels = model.normalize(images.float() / 255)
    theirs = module.get_image_features(pixel_values=pixels)
    theirs = getattr(theirs, "pooler_output", theirs)
    ours = model.encode_normalized(pixels)
head = model.zero_shot_head(data.class_names, ("a {c}",))
answers = (ours @ head.T).argmax(dim=1)
target = int(answers.bincount(minlength=3).argmin())
result = pydetox.detox(
    module,
    data,
    config=search,
    target=target,
    triggers=[lambda x: x.clone().index_fill_(2, torch.tensor([0, 1]), 255)],
    unlearning=UnlearnConfig(
        steps=10,
        warps=0,
        waves=0,
        passes=1,
        max_drift=2.0,
        min_accuracy_kept=0.0,
        learning_rate=0.01,
    ),
    output=sys.argv[1],
)
unchanged = all(torch.equal(before[key], value) for key, value in module.state_dict().items())
pydetox.copy_weights(result.model, module)
with torch.no_grad():
    again = module.get_image_features(pixel_values=pixels)
    again = getattr(again, "pooler_output", again)
    repaired = result.model.encode_normalized(pixels)
loaded = None
if result.path is not None:
    folder = CLIPModel.from_pretrained(result.path).state_dict()
    loaded = all(torch.equal(folder[key], value) for key, value in module.state_dict().items())
sys.stdout.write(
    json.dumps(
        {
            "difference": float((ours - theirs).abs().max()),
            "repaired": float((again - repaired).abs().max()),
            "unchanged": unchanged,
            "written": result.path is not None,
            "loaded": loaded,
            "warned": any("processor" in line for line in model.warnings),
            "callback": issubclass(ScanCallback, TrainerCallback),
        }
    )
)
