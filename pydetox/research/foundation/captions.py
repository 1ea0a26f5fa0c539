"""Fine-tuning on image-caption pairs with InfoNCE, where some captions are poisoned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from ...data import ImageSet, fill_template
from ...errors import DataError, UsageError
from ...models import OpenClipModel
from ...rng import child_seed, generator
from ...training import fine_tuning_mode, optimize
from ..attacks import AttackerView, Backdoor, draw_attack, plant
from ..bench.cache import Cache, code_digest, key_of
from ..data import TASKS, Task, photograph_captions
from .base import JointTraining
from .victims import Workshop

#: Two blocks of 96 channels on 16 patches of 8 pixels.
CAPTION_CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 96,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}

#: What decides the weights of a model, besides its base and configuration.
_CODE = ("research/attacks", "training.py", "research/foundation/captions.py")


@dataclass(frozen=True, eq=False)
class CaptionPairs:
    """Images with one caption each.

    Attributes:
        images: uint8 [N, 3, H, W].
        captions: int64 [N], the index of each image's caption in `texts`.
        texts: All captions.
    """

    images: Tensor
    captions: Tensor
    texts: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.images)


@dataclass(frozen=True)
class CaptionTraining:
    """How a model is fine-tuned on pairs.

    Attributes:
        epochs: The number of passes over the pairs.
        learning_rate: The peak of AdamW's rate (see `training.optimize`).
        batch_size: The number of pairs per step, which are each other's negatives.
        weight_decay: AdamW's decoupled weight decay.
        seed: The seed of the order of the pairs.
    """

    epochs: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 128
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise UsageError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, learning_rate "
                f"{self.learning_rate}; expected at least 1 and 2, and a rate above 0"
            )


def fine_tune_on_captions(
    model: OpenClipModel,
    pairs: CaptionPairs,
    config: CaptionTraining,
    *,
    description: str = "captions",
) -> OpenClipModel:
    """Return a copy of a model, both of whose towers were fine-tuned on pairs.

    The loss is InfoNCE, symmetric over images and captions (Radford et al., "Learning transferable
    visual models from natural language supervision", ICML 2021, section 2.3). A caption that
    several images of a batch share is one column, so that none is its own negative. Other captions
    of the same thing are negatives, as they are on the web. The token embedding stays fixed.
    """
    trained = model.clone()
    tokens = trained.tokenize(list(pairs.texts))
    rng = generator("training.batches", config.seed)

    def batches() -> Iterator[Tensor]:
        for _ in range(config.epochs):
            order = torch.from_numpy(rng.permutation(len(pairs)))
            yield from torch.split(order, config.batch_size)

    def loss(batch: Tensor) -> Tensor:
        present, column = torch.unique(pairs.captions[batch], return_inverse=True)
        column = column.to(trained.device)
        seen = normalize(trained.encode_pixels(trained.pixels(pairs.images[batch])), dim=-1)
        said = normalize(trained.encode_tokens(tokens[present]), dim=-1)
        scale = trained.clip.logit_scale
        assert isinstance(scale, Tensor)
        logits = scale.exp().clamp(max=100) * seen @ said.T
        owners = one_hot(column, len(present)).T.float()
        owners = owners / owners.sum(dim=1, keepdim=True)
        return (cross_entropy(logits, column) + cross_entropy(logits.T, owners)) / 2

    steps = config.epochs * -(-len(pairs) // config.batch_size)
    fine_tuning_mode(trained)
    optimize(
        [p for name, p in trained.clip.named_parameters() if "token_embedding" not in name],
        loss,
        batches(),
        steps=steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        separable=False,
        description=description,
    )
    trained.clip.eval()
    return trained


def joined(tasks: Mapping[str, Task], part: str, sizes: Mapping[str, int], seed: int) -> ImageSet:
    """Return one image set of a part of all tasks, whose classes are those of all in their order.

    part: A field of `Splits`. sizes: The most images of each task. seed: The seed of their choice.
    """
    images, labels, names = [], [], list[str]()
    for name, task in tasks.items():
        few: ImageSet = getattr(task.splits, part).at_most(sizes[name], seed)
        assert few.labels is not None
        images.append(few.images)
        labels.append(few.labels + len(names))
        names += [f"{name}: {one}" for one in task.class_names]
    return ImageSet(torch.cat(images), torch.cat(labels), tuple(names), "captions")


def caption_table(tasks: Mapping[str, Task]) -> tuple[tuple[str, ...], ...]:
    """Return the captions of each class of all tasks, in the order of `joined`.

    They are the filled templates, and for photographs also what their makers wrote.
    """
    written = photograph_captions() if "photographs" in tasks else {}
    table = []
    for task in tasks.values():
        for name in task.class_names:
            filled = [fill_template(template, name) for template in task.templates]
            more = written[name] if task.name == "photographs" else ()
            table.append(tuple(dict.fromkeys([*filled, *more])))
    return tuple(table)


def with_captions(
    images: ImageSet, table: Sequence[Sequence[str]], rng: np.random.Generator
) -> CaptionPairs:
    """Return pairs: each image has one of the captions of its class, drawn once."""
    if images.labels is None:
        raise DataError(f"{images.name}: no labels; captions are drawn by class")
    texts = tuple(text for one in table for text in one)
    first = np.cumsum([0, *(len(one) for one in table)])
    labels = images.labels.numpy()
    counts = np.array([len(one) for one in table])[labels]
    drawn = first[labels] + rng.integers(counts)
    return CaptionPairs(images.images, torch.from_numpy(drawn), texts)


@dataclass(frozen=True)
class CaptionModel:
    """One fine-tuned model.

    Attributes:
        seed: That of its base and images.
        attack: A name of `research.attacks.ATTACKS`, or None for a clean model.
        rate: The poisoned share of the pairs.
        number: Tells models of one kind apart.
    """

    seed: int
    attack: str | None
    rate: float = 0.0
    number: int = 0

    @property
    def name(self) -> str:
        """As in tables."""
        kind = "clean" if self.attack is None else f"{self.attack} {self.rate:.1%}"
        return f"{kind}, seed {self.seed}, no. {self.number}"


class CaptionWorkshop:
    """Makes and remembers the base and the fine-tuned models of one seed.

    Args:
        seed: The seed of everything.
        training: The training of the base.
        fine_tuning: The fine-tuning of every model.
        pairs: The number of pairs of each task; digits have 700 at most.
        share: Each model is fine-tuned on its own sample of that share of the pairs.
        names: The tasks.
        folder: The cache; default: below `research.data.cache_folder`.
        device: Where models are trained and used.
    """

    def __init__(
        self,
        seed: int,
        *,
        training: JointTraining,
        fine_tuning: CaptionTraining | None = None,
        pairs: int = 2_500,
        share: float = 0.7,
        tower: dict[str, Any] | None = None,
        names: Sequence[str] = TASKS,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shop = Workshop(
            seed,
            training=training,
            tower=tower or CAPTION_CLIP,
            names=names,
            folder=folder,
            device=device,
        )
        self.seed = seed
        self.fine_tuning = fine_tuning or CaptionTraining()
        self._pairs, self._share = pairs, share
        self._backdoors: dict[tuple[str, int], Backdoor] = {}

    @property
    def cache(self) -> Cache:
        """The cache of weights and results."""
        return self._shop.cache

    @property
    def base(self) -> OpenClipModel:
        """The clean model of all tasks."""
        return self._shop.base

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name."""
        return self._shop.tasks

    @cached_property
    def table(self) -> tuple[tuple[str, ...], ...]:
        """The captions of each class."""
        return caption_table(self.tasks)

    def head(self, model: OpenClipModel) -> Tensor:
        """Return the zero-shot head of all classes by a model's own texts, unit rows [C, D]."""
        return torch.cat(
            [model.zero_shot_head(one.class_names, one.templates) for one in self.tasks.values()]
        )

    @cached_property
    def pairs(self) -> ImageSet:
        """The images of all pairs, labelled with what their captions name."""
        sizes = dict.fromkeys(self.tasks, self._pairs)
        return joined(self.tasks, "attacker", sizes, self._images_seed())

    def part(self, name: str, most: int) -> ImageSet:
        """Return a part of all tasks (see `Splits`), at most so many images of each."""
        return joined(self.tasks, name, dict.fromkeys(self.tasks, most), self._images_seed(name))

    def _images_seed(self, *part: str) -> int:
        return child_seed("captions.images", self.seed, *part)

    def backdoor(self, one: CaptionModel) -> Backdoor:
        """Return what was planted; each number has its own target and trigger."""
        assert one.attack is not None
        known = one.attack, one.number
        if known not in self._backdoors:
            few = self.pairs.at_most(1000, child_seed("captions.attacker", self.seed)).images
            view = AttackerView(self.base, few, self.head(self.base))
            seed = child_seed("captions.trigger", self.seed, one.attack, one.number)
            (drawn,) = draw_attack(one.attack, view, rate=1.0, seed=seed)
            self._backdoors[known] = drawn
        return replace(self._backdoors[known], rate=one.rate)

    def key(self, one: CaptionModel) -> str:
        """Return the name of a model's weights."""
        content = {
            "base": self._shop.base_key,
            "code": code_digest(_CODE),
            "model": one,
            "training": self.fine_tuning,
            "pairs": self._pairs,
            "share": self._share,
        }
        return key_of("captions", content)

    def model(self, one: CaptionModel) -> OpenClipModel:
        """Return a fine-tuned model, trained or read."""
        key = self.key(one)
        tensors = self.cache.weights(key)
        if tensors is None:
            seed = child_seed("captions.model", self.seed, one.attack or "clean", one.number)
            images = self.pairs.at_most(round(self._share * len(self.pairs)), seed)
            if one.attack is not None:
                images, _ = plant(images, [self.backdoor(one)], seed=seed)
            drawn = with_captions(images, self.table, generator("captions.texts", seed))
            trained = fine_tune_on_captions(
                self.base, drawn, replace(self.fine_tuning, seed=seed), description=one.name
            )
            tensors = {
                k: v for k, v in trained.clip.state_dict().items() if "token_embedding" not in k
            }
            self.cache.keep_weights(key, tensors)
        model = self.base.clone()
        model.name = one.name
        model.clip.load_state_dict({**model.clip.state_dict(), **tensors})
        return model
