"""Run with transformers on the path: makes random CLIPModel folders, and says what they compute.

python clip_of_transformers.py make FOLDER VARIANT   a folder as `save_pretrained` writes it
python clip_of_transformers.py embed FOLDER          embeddings of FOLDER/in.npz, to FOLDER/out.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
CHANGES: dict[str, dict] = {
    "quick-gelu": {},
    "gelu": {"hidden_act": "gelu"},
    "tanh": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}


def make(folder: Path, variant: str) -> None:
    torch.manual_seed(7)
    change = CHANGES.get(variant, {})
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(**VISION, **change).to_dict(),
        text_config=CLIPTextConfig(**TEXT, **change).to_dict(),
        projection_dim=24,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first, which would hide an exchange
                parameter.normal_(std=0.3)
    half = torch.float16 if variant == "float16" else torch.float32
    model.to(half).save_pretrained(folder, max_shard_size="60kB" if variant == "sharded" else "1GB")
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.25],
    ).save_pretrained(folder)


def embed(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder).eval().float()
    given = np.load(folder / "in.npz")
    with torch.no_grad():
        vision = model.vision_model(pixel_values=torch.from_numpy(given["images"])).pooler_output
        text = model.text_model(input_ids=torch.from_numpy(given["tokens"])).pooler_output
        images, texts = model.visual_projection(vision), model.text_projection(text)
    np.savez(folder / "out.npz", images=images.numpy(), texts=texts.numpy())
    if "photograph" in given:
        processor = CLIPImageProcessor.from_pretrained(folder)
        pixels = processor(given["photograph"], return_tensors="np")["pixel_values"]
        np.savez(folder / "pixels.npz", pixels=pixels)
    sys.stdout.write(json.dumps({"scale": float(model.logit_scale.exp())}))


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    make(Path(folder), *rest) if command == "make" else embed(Path(folder))
