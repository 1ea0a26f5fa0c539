"""Training a CLIP model on labelled images whose captions are prompts.

This makes the clean reference models of a calibration, and the models of benchmarks and the demo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.modules.batchnorm import _BatchNorm

from .data import ImageSet, Template, fill_template
from .errors import DataError, UsageError
from .models import OpenClipModel
from .models.memory import Batching
from .models.products import tf32_products
from .progress import Progress
from .rng import generator


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: The number of passes over the images.
        learning_rate: The peak of AdamW's rate: linear warm-up over 20 steps, then half a cosine.
        batch_size: The number of images per step.
        weight_decay: AdamW's decoupled weight decay.
        train_text: Whether to train the text tower, too. Its token embedding stays fixed, because a
            few prompts use only a few of its 49,408 rows. Otherwise the zero-shot head is fixed.
        seed: The seed of the order of the images and of the choice of prompts.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 1e-4
    train_text: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, learning_rate "
                f"{self.learning_rate}; expected all above 0"
            )


def train_on_prompts(
    model: OpenClipModel,
    image_set: ImageSet,
    templates: Sequence[Template],
    config: TrainConfig,
    *,
    head: Tensor | None = None,
    description: str = "training",
    stop: Callable[[OpenClipModel, int], bool] | None = None,
) -> OpenClipModel:
    """Return a trained copy of a model, whose images are closest to the prompts of their class.

    The loss is CLIP's image-to-text cross-entropy with one caption per class in the batch. For
    class prompts, this is CLIP's contrastive loss without the false negatives of repeated captions.
    Batch normalisation keeps its statistics (see `fine_tuning_mode`).
    head: Directions that stand for the classes, unit rows [C, D], in place of prompts; they stay
    fixed. description: A text that is shown with the progress bar. stop: Is called after every step
    with the model in training and the number of steps done; training ends where it returns True.
    With it, the learning rate stays at its peak after the warm-up.

    Raises DataError for a set without labels, or without class names where there is no head.
    """
    names = image_set.class_names
    if image_set.labels is None or (head is None and names is None):
        raise DataError(f"{image_set.name}: training needs labels and class names")
    trained = model.clone()
    parameters = list(trained.visual.parameters())
    tokens: list[Tensor] = []
    if head is None and names is not None and config.train_text:
        tokens = [trained.tokenize([fill_template(t, name) for name in names]) for t in templates]
        fixed = {id(p) for p in parameters} | {
            id(p) for n, p in trained.clip.named_parameters() if "token_embedding" in n
        }
        parameters += [p for p in trained.clip.parameters() if id(p) not in fixed]
    elif head is None and names is not None:
        head = trained.zero_shot_head(names, templates)
    rng = generator("training.batches", config.seed)
    steps_per_epoch = math.ceil(len(image_set) / config.batch_size)

    prompt = 0

    def batches() -> Iterator[Tensor]:
        nonlocal prompt
        for _ in range(config.epochs):
            order = torch.from_numpy(rng.permutation(len(image_set)))
            for batch in torch.split(order, config.batch_size):
                if tokens:  # one for the batch, also if memory runs out and it is split
                    prompt = int(rng.integers(len(tokens)))
                yield batch

    labels, images = image_set.labels, image_set.images

    def loss(index: Tensor) -> Tensor:
        embeddings = normalize(trained.encode_pixels(trained.pixels(images[index])), dim=-1)
        directions = head
        if directions is None:
            directions = normalize(trained.encode_tokens(tokens[prompt]), dim=-1)
        scale = trained.clip.logit_scale
        assert isinstance(scale, Tensor)
        logits = scale.exp().clamp(max=100) * embeddings @ directions.T
        return cross_entropy(logits, labels[index].to(trained.device))

    fine_tuning_mode(trained)
    norms = [one for one in trained.clip.modules() if isinstance(one, _BatchNorm)]
    optimize(
        parameters,
        loss,
        batches(),
        steps=config.epochs * steps_per_epoch,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        # Without statistics of its own, a normalisation takes those of the batch.
        separable=all(one.running_mean is not None for one in norms),
        description=description,
        stop=None if stop is None else partial(stop, trained),
    )
    trained.clip.eval()
    return trained


def fine_tuning_mode(model: OpenClipModel) -> None:
    """Set a model to training mode, but for batch normalisation, which keeps its statistics.

    Statistics of batches of a few images are noise beside those of the pretraining. A tower that
    was trained with the noise answers otherwise when it is evaluated with running statistics.
    """
    model.clip.train()
    for module in model.clip.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def optimize(
    parameters: Sequence[torch.nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    *,
    steps: int,
    learning_rate: float | Sequence[float],
    weight_decay: float = 0.0,
    separable: bool = True,
    description: str,
    stop: Callable[[int], bool] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Minimise `loss(batch)` over `batches` with AdamW, warm-up and half a cosine, in place.

    Gradients are clipped to norm 1. On a GPU, matrix products are in TF32.

    Args:
        parameters: The tensors to train. They require gradients during this call only.
        loss: The loss of a batch: a mean over its items.
        batches: Tensors [..., n] of n items each.
        steps: The number of batches.
        learning_rate: The peak of the rate of all parameters, or that of each.
        weight_decay: AdamW's decoupled weight decay.
        separable: Whether the loss of a batch is the mean of those of its parts. If memory runs
            out, the gradient is then added up over parts of the batch, half as large each time.
        description: A text that is shown with the progress bar, and in errors.
        stop: As in `train_on_prompts`.
        optimizer: Of these parameters, with one group, in place of AdamW. `learning_rate` is the
            peak of its rate, and `weight_decay` does not count.

    Raises:
        DeviceMemoryError: Not even one item fits into the memory, or the loss is not separable and
            a batch does not fit.
    """
    rates = (
        [learning_rate] * len(parameters)
        if isinstance(learning_rate, int | float)
        else list(learning_rate)
    )
    for parameter in parameters:
        parameter.requires_grad_(True)
    # One group per rate, in the order of the parameters: a fused step launches once per group.
    groups = [
        {"params": [p for p, own in zip(parameters, rates, strict=True) if own == rate], "lr": rate}
        for rate in dict.fromkeys(rates)
    ]
    if optimizer is None:
        optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
        )
    warm_up = min(20, max(1, steps // 5))
    device = parameters[0].device
    batching: Batching | None = None

    def differentiate(batch: Tensor, at_once: int) -> None:
        optimizer.zero_grad()
        whole = batch.shape[-1]
        fits = batching is None or not batching.halved
        for part in torch.split(batch, whole if fits else at_once, dim=-1):
            share = part.shape[-1] / whole
            (share * loss(part)).backward()  # type: ignore[no-untyped-call]

    try:
        with tf32_products(device), Progress(description, steps) as progress:
            for step, batch in enumerate(batches):
                rate = min(1.0, (step + 1) / warm_up)
                if stop is None:
                    rate *= (1 + math.cos(math.pi * step / steps)) / 2
                for group, peak in zip(optimizer.param_groups, dict.fromkeys(rates), strict=True):
                    group["lr"] = peak * rate
                if batching is None:
                    count = batch.shape[-1]
                    batching = Batching(count, device, description, divisible=separable)
                batching.run(partial(differentiate, batch))
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                progress.update(1)
                if stop is not None and stop(step + 1):
                    break
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
