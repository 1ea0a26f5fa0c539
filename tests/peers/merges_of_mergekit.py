"""Run recipes with mergekit and with pydetox on the same folders; print the differences as JSON.

python merges_of_mergekit.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # beside the tests, not a release

from pydetox.compat import merge

PART = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
# mergekit takes no whole CLIPModel: it asks for embeddings of a vocabulary.
CONFIG = CLIPVisionConfig(**PART, image_size=16, patch_size=8, projection_dim=16)


def weighted(name: str, weight: float) -> dict[str, object]:
    return {"model": name, "parameters": {"weight": weight}}


#: The options of a recipe, and its models beside the base.
RECIPES: dict[str, tuple[dict[str, object], list[dict[str, object]]]] = {
    "one": ({}, [weighted("first", -0.6)]),
    "two": ({"lambda": 0.7}, [weighted("first", 0.3), weighted("second", -1.2)]),
    "normalized": (
        {"normalize": True, "lambda": 1.5},
        [weighted("first", 0.5), weighted("second", 0.25)],
    ),
    "without a sum": (
        {"normalize": True},
        [weighted("first", 1.0), weighted("second", -1.0)],
    ),
    "base listed": ({}, [{"model": "base"}, weighted("second", 0.4)]),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def main(folder: Path) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for number, name in enumerate(("base", "first", "second")):
            torch.manual_seed(number)
            CLIPVisionModelWithProjection(CONFIG).to(dtype).save_pretrained(folder / kind / name)
        base = tensors(folder / kind / "base")
        for name, (options, models) in RECIPES.items():
            recipe = {
                "merge_method": "task_arithmetic",
                "base_model": "base",
                "models": models,
                "parameters": options,
            }
            written = folder / kind / f"{name}.yaml"
            written.write_text(yaml.safe_dump(recipe))
            # mergekit knows absolute names alone.
            for one in (recipe, *models):
                for key in {"base_model", "model"} & set(one):
                    one[key] = str(folder / kind / Path(str(one[key])).name)
            # Unasked, it rounds every intermediate result to half precision.
            wide = {"dtype": "float32", "out_dtype": kind}
            run_merge(
                MergeConfiguration.model_validate(recipe | wide),
                str(folder / kind / "theirs" / name),
                MergeOptions(copy_tokenizer=False, write_model_card=False),
            )
            for one in models:  # for the other dtype
                one["model"] = Path(str(one["model"])).name
            theirs = tensors(folder / kind / "theirs" / name)
            ours = load_file(merge(written, folder / kind / f"{name}.safetensors"))
            floating = [k for k in base if base[k].is_floating_point()]
            found[f"{kind}, {name}"] = {
                "same names": sorted(theirs) == sorted(ours) == sorted(base),
                "same dtypes": all(theirs[k].dtype == ours[k].dtype for k in base),
                "largest difference": max(
                    float((theirs[k].double() - ours[k].double()).abs().max()) for k in floating
                ),
                "largest weight": max(float(theirs[k].double().abs().max()) for k in floating),
                "changed": max(
                    float((ours[k].double() - base[k].double()).abs().max()) for k in floating
                ),
                "equal tensors": sum(torch.equal(theirs[k], ours[k]) for k in base),
                "tensors": len(base),
            }
    sys.stdout.write(f"\n{json.dumps(found)}\n")


main(Path(sys.argv[1]))
