"""Run with peft on the path: adapters that begin in different ways, and what peft makes of them.

python adapters_of_peft.py FOLDER WAY...   FOLDER/base.safetensors; FOLDER/WAY as `save_pretrained`
                                           writes it; FOLDER/WAY.safetensors, merged into the base
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file


class Net(torch.nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 16), torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def main(folder: Path, ways: list[str]) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_file(Net().state_dict(), folder / "base.safetensors")
    for way in ways:
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["first", "second"],
            init_lora_weights={"True": True}.get(way, way),
        )
        model = get_peft_model(base(folder), config)
        with torch.no_grad():  # a training
            for name, value in model.named_parameters():
                if "lora_" in name:
                    value.add_(torch.randn_like(value) * 0.1)
        model.save_pretrained(folder / way)
        loaded = PeftModel.from_pretrained(base(folder), folder / way)
        save_file(loaded.merge_and_unload().state_dict(), folder / f"{way}.safetensors")


def base(folder: Path) -> Net:
    net = Net()
    net.load_state_dict(load_file(folder / "base.safetensors"))
    return net


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
