"""The change of a repair as a LoRA adapter that peft loads onto the model before the repair.

The change of a linear layer becomes s B A, by the singular value decomposition, cut at a rank. Its
largest singular values are the best such approximation (Eckart and Young, 1936). peft has places
for the rest, too: biases of these layers (`bias="all"`), and modules that are stored in full
(`modules_to_save`), such as normalisations and embeddings. So nothing but the cut is lost.

Source: Hu et al., "LoRA", arXiv 2106.09685; names and configuration are those that peft's
`get_peft_model_state_dict` and `LoraConfig` write.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydetox.atomic import atomic_directory
from pydetox.checkpoints.index import quote
from pydetox.checkpoints.layout import ADAPTER_CONFIG_NAME
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.writing import write_safetensors
from pydetox.errors import ArchitectureError, UsageError

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
#: What the folder of an adapter holds; only such a folder is ever replaced.
ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, "README.md")
DEFAULT_RANK = 32
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Adapter:
    """The change from one set of weights to another.

    Attributes:
        tensors: The content of `adapter_model.safetensors`.
        target_modules: The linear layers that have A and B.
        modules_to_save: The modules that are stored in full.
        has_biases: Whether there are biases of linear layers.
        rank: r, the rank of every B A.
        error: The Frobenius norm of what the adapter leaves out, as a share of that of the change.
    """

    tensors: Mapping[str, Tensor]
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    has_biases: bool
    rank: int
    error: float

    def config(self, base: str) -> dict[str, Any]:
        """Return the content of `adapter_config.json`. base: The name of the model before."""
        return {
            "base_model_name_or_path": base,
            "bias": "all" if self.has_biases else "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "modules_to_save": list(self.modules_to_save) or None,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": list(self.target_modules),
            "task_type": None,
            "use_dora": False,
            "use_rslora": False,
        }


def make_adapter(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, rank: int = DEFAULT_RANK
) -> Adapter:
    """Return the adapter that turns one model's weights into another's.

    Args:
        before: The weights before the repair, by the names of transformers, of any dtype.
        after: The weights after it, of the same names and shapes.
        rank: r. Layers with fewer rows or columns are filled up with zeros.

    Raises:
        UsageError: The rank is below 1, or nothing differs.
        ArchitectureError: The weights have other names or shapes than each other, or no linear
            layer differs, for which an adapter has no form.
    """
    if rank < 1:
        raise UsageError(f"rank is {rank}; expected at least 1")
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[0]
        raise ArchitectureError(f"tensor {quote(odd)}: is in one of the two models alone")
    wrong = [k for k in before if before[k].shape != after[k].shape]
    if wrong:
        raise ArchitectureError(
            f"tensor {quote(wrong[0])}: is {list(before[wrong[0]].shape)} and "
            f"{list(after[wrong[0]].shape)}; expected the same shape in both models"
        )
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    if not changed:
        raise UsageError("the two models have equal weights; there is no change to write")
    linear = {k.removesuffix(".weight") for k in before if _is_linear(k, before[k])}
    whole = _modules_in_full(changed, linear)
    tensors: dict[str, Tensor] = {}
    targets, lost, total, biases = list[str](), 0.0, 0.0, False
    for name in before:
        if any(name.startswith(f"{module}.") for module in whole):
            tensors[_PREFIX + name] = after[name]
            total += _energy(after[name].double() - before[name].double())
    for name in changed:
        module, _, kind = name.rpartition(".")
        if _PREFIX + name in tensors:
            continue
        change = after[name].double() - before[name].double()
        total += _energy(change)
        if module in linear and kind == "weight":
            down, up, left = _cut(change, rank)
            lost += left
            targets.append(module)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = down.float()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = up.float()
        elif module in linear and kind == "bias":
            biases = True
            tensors[f"{_PREFIX}{module}.base_layer.bias"] = after[name]
        else:  # a parameter of the whole model, for which peft has no place
            lost += _energy(change)
    if not targets:
        raise ArchitectureError("no linear layer differs; an adapter has no form without one")
    # A bias of a layer without A and B is its module's own.
    plain = {
        name.replace(".base_layer.bias", ".bias") if _owner(name) not in targets else name: value
        for name, value in tensors.items()
    }
    return Adapter(
        plain, tuple(targets), tuple(sorted(whole)), biases, rank, math.sqrt(lost / total)
    )


def save_adapter(
    directory: str | os.PathLike[str],
    adapter: Adapter,
    *,
    base: str,
    provenance: Provenance,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a folder, complete or not at all.

    `peft.PeftModel.from_pretrained(model, folder)` loads it, where `model` is the base in
    transformers. `convert_checkpoint` with `base=` merges it.

    Args:
        directory: The folder to create.
        adapter: The adapter.
        base: The name of the model that it changes, as peft should find it.
        provenance: How the change was made.
        overwrite: Whether to replace the folder if it holds nothing but an adapter.

    Raises:
        OutputError: The folder exists or cannot be written.
    """
    target = Path(directory)
    card = (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: peft\n---\n\n# {target.resolve().name}"
        "\n\nThe change that a repair made to an image tower, as a LoRA adapter.\n\n"
        f"Method: {provenance.method}. Rank {adapter.rank}; the adapter leaves out "
        f"{100 * adapter.error:.3g}% of the change (Frobenius norm).\n"
    )
    metadata = {"format": "pt", METADATA_KEY: provenance.to_json()}
    with atomic_directory(target, overwrite=overwrite, replaceable=ADAPTER_FILES) as folder:
        config = json.dumps(adapter.config(base), indent=2)
        (folder / ADAPTER_CONFIG_NAME).write_text(f"{config}\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        with (folder / ADAPTER_WEIGHTS_NAME).open("wb") as file:
            write_safetensors(file, adapter.tensors, metadata)
    return target


def _is_linear(name: str, value: Tensor) -> bool:
    """Return whether a tensor is the matrix of a layer that peft gives A and B."""
    return value.ndim == 2 and name.endswith(".weight") and "embedding" not in name


def _modules_in_full(changed: list[str], linear: set[str]) -> set[str]:
    """Return the modules that are stored in full, without those inside of others.

    These are changed modules that are no linear layers. One of them may hold layers that are none
    to peft: SigLIP's attention takes the weights of its last layer itself.
    """
    found = set()
    for name in changed:
        module = name.rpartition(".")[0]
        if module and module not in linear:
            found.add(module)
    return {one for one in found if not any(one.startswith(f"{other}.") for other in found)}


def _cut(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A [r, in], B [out, r] with B A near a change [out, in], and the energy of the rest."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    down, up = change.new_zeros(rank, change.shape[1]), change.new_zeros(change.shape[0], rank)
    down[:kept] = root[:, None] * right[:kept]
    up[:, :kept] = left[:, :kept] * root
    return down, up, float(values[kept:].square().sum())


def _energy(change: Tensor) -> float:
    return float(change.square().sum())


def _owner(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(".base_layer.bias")
