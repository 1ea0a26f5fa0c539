"""DECREE's detection of backdoored image encoders, with the arguments and files of its `main.py`.

Source: Feng et al., "Detecting Backdoors in Pre-trained Encoders" (CVPR 2023), and
github.com/GiantSeaweed/DECREE. The original unpickles the encoder, runs on a GPU alone and computes
in float64 outside of the encoder. Here nothing is unpickled, and the stamping, the loss and the
update of the trigger are pydetox's operators.
"""

from __future__ import annotations

import io
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..atomic import write_file
from ..checkpoints.sources import find_weights, open_weights
from ..checkpoints.weights import read_open
from ..data import ImageData, ImageSet, load_images
from ..errors import ArchitectureError, CheckpointError, UsageError
from ..models.encoder import EncoderModel, from_encoder
from ..models.frozen import freeze
from ..ops import (
    BestTriggers,
    embedding_collapse,
    stamp_triggers,
    stamp_triggers_gradients,
    trigger_update,
)
from ..progress import Progress
from ..rng import generator

#: The largest |mask|_1 / (3 H W) of a backdoored encoder (section 4.1 of the paper).
THRESHOLD = 0.1
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: Mean and std of the images of each `encoder_usage_info`, and the size of its images.
_USAGES: Mapping[str, tuple[tuple[tuple[float, ...], tuple[float, ...]], int]] = {
    "CLIP": (_IMAGENET, 224),
    "imagenet": (_IMAGENET, 224),
    "moco": (_IMAGENET, 224),
    "cifar10": (((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), 32),
    "stl10": (((0.44087798, 0.42790666, 0.38678814), (0.25507198, 0.24801506, 0.25641308)), 32),
}
_DEFAULTS: Mapping[str, Any] = {
    "batch_size": 256,
    "gpu": "0",
    "lr": 1e-3,
    "seed": 100,
    "model_flag": "",
    "encoder_path": "",
    "encoder_usage_info": "cifar10",
    "mask_init": "rand",
    "id": "",
    "result_file": "",
    "arch": "resnet18",
    "thres": 0.99,
}
_EPOCHS, _PATIENCE, _FACTOR, _FIRST_COST, _LARGEST_COST = 1000, 5, 5.0, 1e-3, 1e5


@dataclass(frozen=True, eq=False)
class DecreeResult:
    """What `decree` found.

    Attributes:
        l1: |mask|_1 over three channels of the smallest working trigger; infinite if none worked.
        p_l1: l1 / (3 H W).
        backdoored: Whether p_l1 is below 0.1.
        mask: float32 [H, W] in [0, 1].
        pattern: float32 [3, H, W] in [0, 1].
        epochs: The number of epochs that the search took.
        seconds: The wall time of the search.
        folder: The folder of its pictures in `trigger_inv`.
    """

    l1: float
    p_l1: float
    backdoored: bool
    mask: Tensor
    pattern: Tensor
    epochs: int
    seconds: float
    folder: Path


def decree(
    args: Namespace | Mapping[str, Any] | None = None,
    *,
    images: ImageData | None = None,
    **changes: Any,
) -> DecreeResult:
    """Run DECREE's `main`: search for one trigger that gives all images one embedding.

    A line `ENCODER_PATH,MODEL_FLAG,L1,SECONDS` is appended to `result_file` if it is given. The
    mask, the pattern and their product are written into a folder of `trigger_inv`, as PNG files.

    Args:
        args: DECREE's arguments, as its parser returns them, or as a mapping. Its defaults hold for
            the others, but `mask_init` is `rand`. The device is GPU `gpu`, or the CPU where there
            is none.
        images: Clean images in any form that `load_images` reads. Default: what DECREE takes,
            `data/cifar10/test.npz` (or `stl10`), of which it uses a tenth, and `data/imagenet`,
            of whose validation part it uses a fifth. Of given images all are used.
        changes: Single arguments by name, such as `encoder_path="clean.pth"`.

    Raises:
        UsageError: There is no such argument, or it has another value than DECREE knows.
        CheckpointError: The encoder cannot be read.
        ArchitectureError: Its weights do not fit `encoder_usage_info` and `arch`.
        DataError: The images cannot be read.
    """
    given = _arguments(args, changes)
    (mean, std), size = _USAGES[given["encoder_usage_info"]]
    module = _encoder(given)
    model = from_encoder(
        module, image_size=size, mean=mean, std=std, name=Path(given["encoder_path"]).name
    )
    device = f"cuda:{given['gpu']}" if torch.cuda.is_available() else "cpu"
    model.to(device)
    clean = _images(images, given, model)
    start = time.perf_counter()
    search = _Search(model, clean, given)
    with Progress("DECREE", _EPOCHS) as progress:
        while not search.done and search.epochs < _EPOCHS:
            search.take_epoch()
            progress.update(1)
    seconds = time.perf_counter() - start
    mask, pattern = search.result()
    l1 = 3 * search.smallest
    share = l1 / (3 * size * size)
    folder = _write(given, mask, pattern, l1, search.epochs, search.least_cost)
    if given["result_file"]:
        line = f"{given['encoder_path']},{given['model_flag']},{l1:.4f},{seconds:.4f}\n"
        with Path(given["result_file"]).open("a", encoding="utf-8") as file:
            file.write(line)
    return DecreeResult(l1, share, share < THRESHOLD, mask, pattern, search.epochs, seconds, folder)


def _arguments(args: Namespace | Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Any:
    given = {**(vars(args) if isinstance(args, Namespace) else args or {}), **changes}
    unknown = sorted(set(given) - set(_DEFAULTS))
    if unknown:
        raise UsageError(
            f"DECREE has no argument {unknown[0]!r}; expected some of {', '.join(_DEFAULTS)}"
        )
    given = {**_DEFAULTS, **{k: v for k, v in given.items() if v is not None}}
    given["mask_init"] = given["mask_init"] or "rand"
    for key, known in (
        ("encoder_usage_info", tuple(_USAGES)),
        ("mask_init", ("rand", "orc")),
        ("arch", ("resnet18", "resnet34", "resnet50")),
    ):
        if given[key] not in known:
            raise UsageError(f"{key} is {given[key]!r}; expected one of {', '.join(known)}")
    if not given["encoder_path"]:
        raise UsageError("encoder_path is missing; expected the file of an encoder")
    return given


def _encoder(given: Mapping[str, Any]) -> nn.Module:
    """Return the encoder with the weights of its file."""
    path = find_weights(Path(os.fspath(given["encoder_path"])))
    usage = given["encoder_usage_info"]
    try:
        with open_weights(path) as weights:
            state, _ = read_open(weights)
        module, prefixes = _architecture(usage, given["arch"])
        expected = module.state_dict()
        own = _named_as(expected, state, prefixes)
        if own is None:
            raise ArchitectureError(
                f"its weights do not fit encoder_usage_info {usage!r} and arch {given['arch']!r}"
            )
        module.load_state_dict(own)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    return module.eval()


def _architecture(usage: str, arch: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return an encoder with random weights, and what its names may begin with in a file."""
    if usage in ("CLIP", "imagenet"):
        from open_clip.modified_resnet import ModifiedResNet

        if usage == "CLIP":
            return ModifiedResNet((3, 4, 6, 3), 1024, 32, 224, 64), ("visual.",)
    from torchvision.models import get_model

    if usage in ("moco", "imagenet"):
        network = get_model("resnet18" if usage == "moco" else "resnet50", weights=None)
        network.fc = nn.Identity()
        return network, ("encoder_q.", "visual.")
    network = get_model(arch, weights=None)
    parts: list[nn.Module] = []
    for name, part in network.named_children():
        if name == "conv1":
            parts.append(nn.Conv2d(3, 64, 3, 1, 1, bias=False))
        elif not isinstance(part, nn.Linear | nn.MaxPool2d):
            parts.append(part)
    return nn.Sequential(*parts, nn.Flatten()), ("f.f.", "f.")


def _named_as(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], prefixes: tuple[str, ...]
) -> dict[str, Tensor] | None:
    """Return the weights of a file under the names of a module; None if they do not fit."""
    for prefix in ("", *prefixes):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        own = {k: v for k, v in own.items() if k in expected}
        if own.keys() == expected.keys() and all(
            v.shape == expected[k].shape for k, v in own.items()
        ):
            return own
    return None


def _images(images: ImageData | None, given: Mapping[str, Any], model: EncoderModel) -> Tensor:
    usage, seed = given["encoder_usage_info"], int(given["seed"])
    share = 1.0
    spec: ImageData
    if images is not None:
        spec = images
    elif usage in ("cifar10", "stl10"):
        spec, share = f"data/{usage}/test.npz", 0.1
    else:
        spec, share = "imagenet-test=data/imagenet", 0.2
    size = model.image_size
    found: ImageSet = load_images(
        spec, image_size=size, resize_mode="shortest", interpolation="bilinear", seed=seed
    )
    count = len(found) if share == 1.0 else max(2, math.floor(len(found) * share))
    return found.at_most(count, seed).images


class _Search:
    """DECREE's search for one trigger, epoch by epoch."""

    def __init__(self, model: EncoderModel, images: Tensor, given: Mapping[str, Any]) -> None:
        self._model, self._images = model, images.to(model.device)
        self._tower = freeze(model.visual, name=model.name)
        self._batch, self._seed = int(given["batch_size"]), int(given["seed"])
        self._rate, self._threshold = float(given["lr"]), float(given["thres"])
        large = given["encoder_usage_info"] in ("CLIP", "imagenet", "moco")
        self.least_cost = 1e-7 if large else 1e-5
        self._stop_after = (7 if large else 2) * _PATIENCE
        late = given["encoder_usage_info"] in ("CLIP", "imagenet")
        self._rate_changes = (200, 500) if late else (30, 50)
        device, size = model.device, model.image_size
        rng = generator("compat.decree", self._seed)
        inner = {"CLIP": 176, "imagenet": 176, "moco": 176}.get(given["encoder_usage_info"], 22)
        mask = torch.from_numpy(rng.random((1, size, size)))
        if given["mask_init"] == "orc":
            first = (size - inner) // 2
            mask = torch.full((1, size, size), 1e-7, dtype=torch.float64)
            mask[:, first : first + inner, first : first + inner] = 1.0
        pattern = torch.from_numpy(rng.random((1, 3, size, size)))
        # float32 holds no number between 1 - 6e-8 and 1.
        first_mask, first_pattern = (
            torch.atanh((x * 2 - 1).clamp(-1 + 1e-7, 1 - 1e-7)).float().to(device)
            for x in (mask, pattern)
        )
        self._logits = first_mask, first_pattern
        self._first = torch.zeros_like(first_mask), torch.zeros_like(first_pattern)
        self._second = torch.zeros_like(first_mask), torch.zeros_like(first_pattern)
        self._best = first_mask.clone(), first_pattern.clone()
        self._norm = torch.full((1,), math.inf, dtype=torch.float64, device=device)
        self._steps = torch.zeros(1, dtype=torch.int64, device=device)
        self._active = torch.ones(1, dtype=torch.bool, device=device)
        self._cost = _FIRST_COST
        self._hits = self._misses = self._at_least = self._still = 0
        self._before = math.inf
        self.epochs, self.done = 0, False

    @property
    def smallest(self) -> float:
        """|mask|_1 of the smallest working trigger."""
        return float(self._norm)

    def take_epoch(self) -> None:
        """Pass over all images once."""
        early, late = self._rate_changes
        rate = self._rate if self.epochs < early else 0.1 if self.epochs < late else 0.05
        order = generator("compat.decree-batches", self._seed, self.epochs)
        indices = torch.from_numpy(order.permutation(len(self._images))).to(self._images.device)
        cosines = [
            self._step(self._images[part], rate)
            for part in torch.split(indices, self._batch)
            if len(part) > 1  # a single image has no pairs
        ]
        self.epochs += 1
        mean = sum(cosines) / len(cosines)
        self.done = abs(mean) > self._threshold and self._still > self._stop_after

    def _step(self, images: Tensor, rate: float) -> float:
        mask, pattern = self._logits
        mean, std, patch = self._model.mean, self._model.std, self._tower.patch_size
        rows = stamp_triggers(images, mask, pattern, mean=mean, std=std, patch_size=patch).detach()
        flat = rows.flatten(0, 1).requires_grad_()
        embeddings = self._tower(flat)
        cosine = embedding_collapse(embeddings[None].float())
        (pulled,) = torch.autograd.grad(-cosine.sum(), flat)
        gradients = stamp_triggers_gradients(
            pulled.view_as(rows), images, mask, pattern, mean=mean, std=std, patch_size=patch
        )
        reached = float(cosine.detach())
        works = abs(reached) > self._threshold
        trigger_update(
            (mask, pattern),
            gradients,
            self._first,
            self._second,
            # DECREE's norm counts each pixel of the mask once per channel.
            cost=mask.new_tensor([3 * self._cost]),
            learning_rate=mask.new_tensor([rate]),
            steps=self._steps,
            active=self._active,
            betas=(0.5, 0.9),
            best=BestTriggers(
                self._best,
                self._norm,
                torch.tensor([works], device=mask.device),
            ),
        )
        self._adapt(works)
        return reached

    def _adapt(self, works: bool) -> None:
        """Set the weight of the mask's norm, as DECREE does after every step."""
        smallest = self.smallest
        if math.isfinite(smallest):
            self._still = self._still + 1 if smallest >= self._before else 0
        self._before = min(self._before, smallest)
        if self._cost < self.least_cost and works:
            self._at_least += 1
            if self._at_least > 2 * _PATIENCE:
                self._cost, self._hits, self._misses = _FIRST_COST, 0, 0
        else:
            self._at_least = 0
        self._hits, self._misses = (self._hits + 1, 0) if works else (0, self._misses + 1)
        if self._hits > _PATIENCE:
            self._hits = 0
            if self._cost < _LARGEST_COST:
                self._cost *= _FACTOR
        elif self._misses > _PATIENCE:
            self._misses = 0
            if self._cost >= self.least_cost:
                self._cost /= _FACTOR

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mask float32 [H, W] and pattern [3, H, W] of the smallest working trigger."""
        chosen = self._best if math.isfinite(self.smallest) else self._logits
        mask, pattern = (torch.tanh(x[0].cpu()) / 2 + 0.5 for x in chosen)
        return mask, pattern


def _write(
    given: Mapping[str, Any],
    mask: Tensor,
    pattern: Tensor,
    l1: float,
    epochs: int,
    least_cost: float,
) -> Path:
    name = (
        f"a{given['encoder_usage_info']}_{given['thres']}_{least_cost}_{given['seed']}_"
        f"{given['model_flag']}_{given['batch_size']}_{given['lr']}_{given['mask_init']}"
        f"{given['id']}"
    ).replace(os.sep, "_")
    folder = Path("trigger_inv") / name
    folder.mkdir(parents=True, exist_ok=True)
    wide = mask.expand(3, -1, -1)
    for kind, content in (("mask", wide), ("patch", pattern), ("fus", wide * pattern)):
        pixels = np.asarray((content * 255).permute(1, 2, 0).contiguous(), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        write_file(folder / f"{kind}_e{epochs - 1}_reg{l1:.2f}.png", buffer.getvalue())
    return folder
