"""Checkpoints written by the libraries that made the formats; what pydetox makes of them as JSON.

python checkpoints_of_others.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # beside the tests, not a release

import accelerate
import open_clip
import peft
import pytorch_lightning
import timm
import torch
import torch.distributed
import transformers
from safetensors.torch import load_file
from torch import nn

from pydetox.checkpoints import Provenance, convert_checkpoint, load_checkpoint
from pydetox.checkpoints.adapter_writing import make_adapter, save_adapter
from pydetox.errors import ArchitectureError
from pydetox.models import OpenClipModel
from tests.mini import MINI_CONFIG

FOLDER = Path(sys.argv[1])
CONFIG = FOLDER / "mini.json"
PART = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def new_clip() -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(**MINI_CONFIG).eval()


def judged(path: Path, expected: Mapping[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """Compare what is read of a file with the weights that were written."""
    model = OpenClipModel.from_checkpoint(load_checkpoint(path, model=CONFIG, **options))
    found = model.storage_state_dict()
    return {
        "equal": all(torch.equal(found[k], v) for k, v in expected.items()),
        "names": sorted(set(found) ^ set(expected)),
        "warnings": [line for line in model.warnings if "are a guess" not in line],
    }


def of_lightning() -> dict[str, Any]:
    """A file of Lightning's Trainer, with the model under two attributes."""
    found = {}
    for name in ("model", "clip"):

        class Module(pytorch_lightning.LightningModule):
            def __init__(self, name: str) -> None:
                super().__init__()
                self.save_hyperparameters()
                setattr(self, name, new_clip())
                self.head = nn.Linear(16, 3)

            def training_step(self, batch: Any, _: int) -> torch.Tensor:
                return self.head(batch[0]).sum()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.head.parameters(), lr=0.1)

        module = Module(name)
        trainer = pytorch_lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=FOLDER,
        )
        trainer.fit(module, torch.utils.data.DataLoader([(torch.ones(16),)]))
        path = FOLDER / f"lightning-{name}.ckpt"
        trainer.save_checkpoint(path)
        found[name] = judged(path, getattr(module, name).state_dict())
    return found


def of_torch() -> dict[str, Any]:
    """Names that torch's own wrappers give, by `state_dict()` of the wrapped module."""
    clip = new_clip()
    state = clip.state_dict()
    made: dict[str, Callable[[], Mapping[str, Any]]] = {
        "compile": lambda: torch.compile(clip).state_dict(),
        "data parallel": lambda: nn.DataParallel(clip).state_dict(),
        "data parallel, compiled": lambda: nn.DataParallel(torch.compile(clip)).state_dict(),
        "averaged": lambda: torch.optim.swa_utils.AveragedModel(clip).state_dict(),
    }
    found = {}
    for name, wrapped in made.items():
        path = FOLDER / f"{name}.pt"
        torch.save({"epoch": 1, "state_dict": wrapped()}, path)
        found[name] = judged(path, state)
    return found


def of_distributed() -> dict[str, Any]:
    """Both kinds of FSDP and DistributedDataParallel, with one process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{FOLDER / 'meeting'}", rank=0, world_size=1
    )
    clip = new_clip()
    state = {k: v.clone() for k, v in clip.state_dict().items()}
    found = {}
    torch.save(DistributedDataParallel(clip).state_dict(), FOLDER / "ddp.pt")
    found["ddp"] = judged(FOLDER / "ddp.pt", state)
    # Neither kind takes scalars, such as logit_scale: they get the image tower.
    policy = ModuleWrapPolicy({type(clip.visual.transformer)})
    clip.visual = FullyShardedDataParallel(
        clip.visual, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    torch.save({"model": clip.state_dict()}, FOLDER / "fsdp.pt")
    found["fsdp"] = judged(FOLDER / "fsdp.pt", state)
    second = new_clip()
    fully_shard(second.visual, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    whole = get_model_state_dict(second, options=StateDictOptions(full_state_dict=True))
    torch.save(whole, FOLDER / "fsdp2.pt")
    found["fsdp2"] = judged(FOLDER / "fsdp2.pt", state)
    torch.distributed.destroy_process_group()
    return found


def of_accelerate() -> dict[str, Any]:
    """Folders of accelerate's `save_model` and `save_state`."""
    accelerator = accelerate.Accelerator(cpu=True)
    clip = accelerator.prepare(new_clip())
    accelerator.save_model(clip, FOLDER / "accelerate")
    accelerator.save_state(FOLDER / "accelerate-state")
    state = new_clip().state_dict()
    return {
        "model": judged(FOLDER / "accelerate", state),
        "state": judged(FOLDER / "accelerate-state", state),
    }


def of_timm() -> dict[str, Any]:
    """A file of timm's own saver: the averaged weights of its EMA beside others."""
    from timm.utils import CheckpointSaver, ModelEmaV2

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    averaged = ModelEmaV2(model, decay=0.5)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        model_ema=averaged,
        checkpoint_dir=str(FOLDER),
        recovery_dir=str(FOLDER),
    )
    saver.save_checkpoint(0, metric=1.0)
    found = {}
    for key, expected in (("state_dict", model), ("state_dict_ema", averaged.module)):
        read = load_checkpoint(
            FOLDER / "model_best.pth.tar", model="timm:test_resnet@32", weights_key=key
        )
        made = OpenClipModel.from_checkpoint(read).storage_state_dict()
        found[key] = {
            "equal": all(torch.equal(made[k], v) for k, v in expected.state_dict().items()),
            "names": sorted(set(made) ^ set(expected.state_dict())),
            "warnings": [w for w in read.warnings if "several sets" in w or "nobody looked" in w],
        }
    return found


def of_peft() -> dict[str, Any]:
    """peft's adapters, merged by both, and adapters of pydetox, which peft loads."""
    found: dict[str, Any] = {}
    for kind in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{kind}Config")(
            vision_config=PART | {"image_size": 16, "patch_size": 8},
            text_config=PART
            | {
                "vocab_size": 30,
                "max_position_embeddings": 8,
                "bos_token_id": 0,
                "eos_token_id": 1,
            },
        )
        make = getattr(transformers, f"{kind}Model")
        torch.manual_seed(0)
        model = make(config).eval()
        base = FOLDER / f"{kind}-base"
        model.save_pretrained(base)
        for name, options in (
            ("plain", {}),
            ("rslora", {"use_rslora": True}),
            ("patterns", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}),
            ("biases", {"bias": "lora_only"}),
        ):
            given = peft.LoraConfig(
                r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "fc1"], **options
            )
            adapted = peft.get_peft_model(make.from_pretrained(base), given)
            with torch.no_grad():
                for parameter_name, value in adapted.named_parameters():
                    if "lora_" in parameter_name or (options.get("bias") and value.requires_grad):
                        value.normal_(std=0.1)
            adapted.save_pretrained(FOLDER / f"{kind}-{name}")
            theirs = adapted.merge_and_unload().state_dict()
            output = FOLDER / f"{kind}-{name}.safetensors"
            try:
                convert_checkpoint(FOLDER / f"{kind}-{name}", output, base=base)
            except ArchitectureError as error:
                found[f"{kind}, {name}"] = f"{type(error).__name__}: {error}"
                continue
            ours = load_file(output)
            assert ours.keys() == theirs.keys() - {k for k in theirs if "position_ids" in k}
            found[f"{kind}, {name}"] = max(
                float((v - theirs[k]).abs().max()) for k, v in ours.items()
            )
        found[f"{kind}, written"] = written_adapter(model, FOLDER / f"{kind}-written")
    return found


def written_adapter(model: nn.Module, folder: Path) -> float:
    """Return how far peft's outputs with an adapter of ours are from those of the weights."""
    before = {k: v.clone() for k, v in model.state_dict().items() if "position_ids" not in k}
    after = {
        k: v + 0.1 * torch.randn_like(v) if k.startswith("vision_model") else v
        for k, v in before.items()
    }
    made = make_adapter(before, after, rank=24)
    save_adapter(folder, made, base="x", provenance=Provenance(method="test"))
    pixels = torch.rand(2, 3, 16, 16)
    loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        found = loaded.base_model.model.vision_model(pixel_values=pixels).pooler_output
        merged = loaded.merge_and_unload()
        merged.load_state_dict(after)
        expected = merged.vision_model(pixel_values=pixels).pooler_output
    return float((found - expected).abs().max())


if __name__ == "__main__":
    CONFIG.write_text(json.dumps(MINI_CONFIG))
    found = {
        "lightning": of_lightning(),
        "torch": of_torch(),
        "distributed": of_distributed(),
        "accelerate": of_accelerate(),
        "timm": of_timm(),
        "peft": of_peft(),
    }
    sys.stdout.write(f"\n{json.dumps(found)}\n")
