"""Run with transformers on the path: a small model of SigLIP's kind with a tokenizer of the hub.

python tokenizer_of_the_hub.py FOLDER    writes what was found to FOLDER/found.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.errors import ArchitectureError
from pydetox.models import OpenClipModel

WORDS = ("a", "photo", "of", "cat", "dog", "owl", ".", "the")
TEXT = {
    "context_length": 8,
    "vocab_size": 20,
    "hf_tokenizer_name": "nobody/has-this",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "width": 16,
    "heads": 1,
    "layers": 1,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
}
CONFIG = {
    "embed_dim": 16,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": TEXT,
}
PROMPTS = ["A photo of a cat.", "the DOG", "owl!"]


def write_tokenizer(folder: Path) -> None:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {w: 3 + k for k, w in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def main(folder: Path) -> None:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    torch.manual_seed(0)
    built = {key: value for key, value in CONFIG.items() if key != "custom_text"}
    clip = open_clip.CustomTextCLIP(**built).eval()
    torch.save(clip.state_dict(), source / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    whole = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (source / "open_clip_config.json").write_text(json.dumps(whole))
    write_tokenizer(source)

    checkpoint = load_checkpoint(source)
    model = OpenClipModel.from_checkpoint(checkpoint)
    theirs = open_clip.get_tokenizer(f"local-dir:{source}")(PROMPTS)
    ours = model.tokenize(PROMPTS)
    with torch.no_grad():
        texts = clip.encode_text(theirs)
        close = torch.allclose(model.encode_tokens(ours), texts, atol=1e-5)
    save_checkpoint(
        target,
        model.storage_state_dict(),
        model_config=model.model_config,
        preprocess_config=model.preprocess_config,
        companions=model.companions,
        provenance=Provenance(method="test"),
    )
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{target}")
    tokens = open_clip.get_tokenizer(f"local-dir:{target}")(PROMPTS)
    with torch.no_grad():
        back = torch.allclose(again.eval().encode_text(tokens), texts, atol=1e-5)
    names = ("cat", "dog")
    found = {
        "tokens": ours.tolist(),
        "equal": torch.equal(ours, theirs),
        "texts": close,
        "written back": back,
        "head": list(model.zero_shot_head(names, ["a photo of a {c}."]).shape),
    }
    for path in (target / "tokenizer.json", target / "tokenizer_config.json"):
        path.unlink()
    (target / "special_tokens_map.json").unlink(missing_ok=True)
    try:
        OpenClipModel.from_checkpoint(load_checkpoint(target)).tokenize(PROMPTS)
    except ArchitectureError as error:
        found["without"] = f"{type(error).__name__}: {error}"
    (folder / "found.json").write_text(json.dumps(found))


main(Path(sys.argv[1]))
