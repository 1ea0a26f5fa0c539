"""Run with transformers on the path: random models of each kind, and what they compute.

python layouts_of_transformers.py make FOLDER    FOLDER/KIND as `save_pretrained` writes it, and
                                                 what it computes: FOLDER/KIND.npz
python layouts_of_transformers.py embed FOLDER   what the folders that are there compute
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 16,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
WORDS = ("a", "photo", "of", "cat", "dog", "owl", "the")
#: Class in transformers, configuration, and the names of its image processor and tokenizer.
KINDS = {
    "siglip": ("SiglipModel", {"text_config": {**TEXT, **ENDS}}, "SiglipImageProcessor"),
    "siglip2": (
        "Siglip2Model",
        {"text_config": {**TEXT, **ENDS}, "vision_config": {"num_patches": 9}},
        "Siglip2ImageProcessor",
    ),
    "altclip": (
        "AltCLIPModel",
        {"text_config": {**TEXT, "project_dim": 20}, "projection_dim": 24},
        "CLIPImageProcessor",
    ),
    "chinese_clip": (
        "ChineseCLIPModel",
        {"text_config": TEXT, "projection_dim": 24, "vision_config": {"hidden_act": "gelu"}},
        "ChineseCLIPImageProcessor",
    ),
    "with-projection": (
        "CLIPVisionModelWithProjection",
        {"projection_dim": 24},
        "CLIPImageProcessor",
    ),
    "bare": ("CLIPVisionModel", {}, "CLIPImageProcessor"),
    "metaclip_2": (
        "MetaClip2Model",
        {"text_config": {**TEXT, "eos_token_id": 2}, "projection_dim": 24},
        "CLIPImageProcessor",
    ),
    "metaclip-projection": (
        "MetaClip2VisionModelWithProjection",
        {"projection_dim": 24},
        "CLIPImageProcessor",
    ),
    "chinese-vision": ("ChineseCLIPVisionModel", {}, "ChineseCLIPImageProcessor"),
    "siglip-vision": ("SiglipVisionModel", {}, "SiglipImageProcessor"),
    "siglip2-vision": (
        "Siglip2VisionModel",
        {"num_patches": 9},
        "Siglip2ImageProcessor",
    ),
}
#: Those whose class in transformers takes pixels and gives what is compared, by attribute.
ALONE = {
    "with-projection": "image_embeds",
    "bare": "pooler_output",
    "metaclip-projection": "image_embeds",
    "chinese-vision": "pooler_output",
    "siglip-vision": "pooler_output",
}


def photograph() -> Image.Image:
    """A picture that is not square."""
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    return small.resize((117, 81), Image.Resampling.BICUBIC)


def square() -> Image.Image:
    """A square picture."""
    return photograph().crop((0, 0, 81, 81))


def texts() -> torch.Tensor:
    """Token ids: one text that fills all places, and two with padding (0 or 1) at the end."""
    rows = np.full((3, 12), -1)
    rows[0] = range(5, 17)
    rows[1, :5] = [7, 20, 21, 9, 2]
    rows[2, :2] = [59, 2]
    return torch.from_numpy(rows)


def make(folder: Path) -> None:
    for kind, (name, change, processor) in KINDS.items():
        torch.manual_seed(11)
        cls = getattr(transformers, name)
        vision = {**VISION, **change.get("vision_config", {})}
        if "VisionModel" in name:
            config = cls.config_class(**{**vision, **change})
        else:
            config = cls.config_class(**{**change, "vision_config": vision})
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():  # zeros and ones would hide an exchange
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder / kind, max_shard_size="60kB" if kind == "altclip" else "1GB")
        given = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
        if kind.startswith("siglip2"):
            given |= {"max_num_patches": 9, "patch_size": 8}
        elif kind.startswith("siglip"):
            given |= {"size": {"height": 24, "width": 24}}
        else:
            given |= {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
        getattr(transformers, processor)(**given).save_pretrained(folder / kind)
        write_tokenizer(folder / kind)
    embed(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of seven words, which pads with 1."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {word: 4 + k for k, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def embed(folder: Path) -> None:
    """Write the pixels, embeddings of images and of texts of every folder."""
    for kind, (name, _, processor) in KINDS.items():
        if not (folder / kind).is_dir():
            continue
        model = getattr(transformers, name).from_pretrained(folder / kind).eval()
        prepare = getattr(transformers, processor).from_pretrained(folder / kind)
        picture = square() if kind.startswith("siglip2") else photograph()
        pixels = dict(prepare([picture], return_tensors="pt"))
        images = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 3, 24, 24))).float()
        out = {}
        with torch.no_grad():
            if kind.startswith("siglip2"):
                tower = model.vision_model if kind == "siglip2" else model
                rows = images.view(4, 3, 3, 8, 3, 8).permute(0, 2, 4, 3, 5, 1).reshape(4, 9, -1)
                seen = tower(
                    rows,
                    pixel_attention_mask=torch.ones(4, 9, dtype=torch.long),
                    spatial_shapes=torch.tensor([[3, 3]] * 4),
                ).pooler_output
            elif kind in ALONE:
                seen = getattr(model(pixel_values=images), ALONE[kind])
            else:
                seen = model.vision_model(pixel_values=images).pooler_output
                if hasattr(model, "visual_projection"):
                    seen = model.visual_projection(seen)
            if hasattr(model, "text_model"):
                tokens = texts()
                pad = 1 if kind == "altclip" else 0
                mask = (tokens >= 0).long()
                tokens = tokens.clamp(min=0) + (1 - mask) * pad
                if kind == "metaclip_2":  # as its tokenizer pads
                    tokens, mask = (torch.nn.functional.pad(x, (0, 4)) for x in (tokens, mask))
                if kind.startswith("siglip"):
                    tokens = torch.cat([tokens, tokens[:, :4]], dim=1)  # it takes all 16 at once
                    found = model.text_model(input_ids=tokens).pooler_output
                elif kind in ("altclip", "metaclip_2"):
                    found = model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
                else:
                    found = model.text_model(input_ids=tokens, attention_mask=mask)[0][:, 0]
                if hasattr(model, "text_projection"):
                    found = model.text_projection(found)
                out |= {"tokens": tokens.numpy(), "texts": found.numpy()}
                out |= {"scale": model.logit_scale.exp().numpy().reshape(())}
        np.savez(
            folder / f"{kind}.npz",
            images=images.numpy(),
            seen=seen.numpy(),
            picture=np.asarray(picture),
            pixels=pixels["pixel_values"].numpy(),
            **out,
        )


if __name__ == "__main__":
    command, where = sys.argv[1:]
    {"make": make, "embed": embed}[command](Path(where))
