"""TBAR: finding the trigger vector in weight space.

Source: Abdelraheem, Favero, Bovet, Frossard, "Backdoor Unlearning by Linear Task Decomposition",
arXiv 2510.14845. A short fine-tuning on triggered images gives the trigger vector tau. The repaired
weights are theta_b - alpha tau. There are three ways to get tau:

* `strengthen` is the paper's method. Triggered images are pushed to the target class, and tau is
  the change of the weights.
* `paired` does the same, and holds the predictions of the same images without the trigger.
* `forget` (default) pushes triggered images to the model's predictions *without* the trigger, with
  the target class left out, and holds clean images. tau is the negative change of the weights. On
  small models, where the backdoor is less disentangled than in the paper, this removes most for the
  least clean accuracy. The reason is that the losses of the other two are already close to 0 at
  theta_b, and that of `forget` is not.

None of them needs labels. `forget` also holds the model's own image features, on the given images
and on surrogates of them (`UnlearnConfig.retention`): predictions of a few names do not tell what
happens to everything else that the model knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from ..errors import DataError, UsageError
from ..evaluation import Stamp
from ..models import OpenClipModel
from ..rng import generator
from ..training import optimize
from .configuration import UnlearnConfig
from .retention import HeldSurrogates, nearest_between
from .step_sizes import relative_rates
from .task_vectors import TaskVector
from .toward_base import SHARE_PER_STEP, TowardBase


def trigger_vector(
    model: OpenClipModel,
    images: Tensor,
    triggers: Sequence[Stamp],
    head: Tensor,
    targets: int | Sequence[int],
    config: UnlearnConfig | None = None,
    *,
    base: OpenClipModel | None = None,
    description: str = "trigger vector",
) -> TaskVector:
    """Return tau over the image tower, such that theta_b - alpha tau unlearns for alpha > 0.

    images: The forget set before it is triggered, uint8 [N, 3, H, W]; a few hundred are enough.
    triggers: Known or recovered triggers. In every step, each image gets a random one. They are
    called with images on the device of the head. head: The zero-shot head [C, D]. targets: The
    class that the triggers lead to, or one class per trigger. base: The model that this one was
    fine-tuned from, of the same shape. With `forget`, theta_b - tau then lies between the two
    (`toward_base`), features are held between those of both, and the configuration's learning rate
    does not count.
    Raises DataError without images, and UsageError without triggers, or for a base of another shape
    or with another kind of vector.
    """
    config = config or UnlearnConfig()
    if len(images) < 2:
        raise DataError(f"{len(images)} image; a trigger vector needs at least 2")
    if base is not None and config.vector != "forget":
        raise UsageError(f"a base with vector {config.vector!r}; expected forget")
    target_of_each = one_target_each(triggers, targets)
    tuned = model.clone()
    scale = model.logit_scale
    rng = generator("repair.vector", config.seed)
    size = min(config.batch_size, len(images))
    classes = torch.tensor(target_of_each)
    # Sent once, as bytes; everything that is done to images is done there.
    there = images.to(head.device)
    holds = config.vector == "forget" and config.retention > 0
    surrogates = (
        HeldSurrogates(model, images, config.advanced.surrogates, seed=config.seed, base=base)
        if holds
        else None
    )

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            chosen = rng.choice(len(images), size, replace=False)
            yield torch.from_numpy(np.stack([chosen, rng.integers(len(triggers), size=size)]))

    def loss(batch: Tensor) -> Tensor:
        index, which = batch
        clean = there[index.to(there.device)]
        if config.advanced.augment:
            clean = randomly_shifted(clean, rng)
        # Images are stamped here, because all triggers on all images would fill the memory.
        stamped = stamp_each(clean, triggers, which)
        target = classes[which].to(head.device)
        if config.vector == "strengthen":
            return cross_entropy(scale * _features(tuned, stamped) @ head.T, target)
        with torch.no_grad():
            own = _features(model, clean)
            held = (scale * own @ head.T).softmax(dim=-1)
        wanted = (
            without_target(held, target, config.advanced.certainly_target)
            if config.vector == "forget"
            else one_hot(target, len(head)).float()
        )
        shown = [clean, stamped]
        if surrogates is not None:
            # As many of them as of the others would double the work.
            others, others_own, others_base = surrogates.draw(max(1, len(index) // 2))
            which = surrogates.choose(len(triggers), len(others))
            shown += [others, stamp_each(others, triggers, which)]
        seen = _features(tuned, torch.cat(shown))
        features = torch.split(seen, [len(part) for part in shown])
        logits = scale * torch.cat(features[:2]) @ head.T
        forgetting = cross_entropy(logits, torch.cat([held, wanted]))
        if surrogates is None:
            return forgetting
        base_own = None
        if base is not None:
            with torch.no_grad():
                base_own = _features(base, clean)
        moved = _moved(features[0], own, base_own) + _moved(features[2], others_own, others_base)
        unstamped = _moved(features[3], others_own, others_base)
        moved = moved + config.advanced.triggered_surrogates * unstamped
        return forgetting + config.retention * scale * moved

    names, parameters = map(list, zip(*tuned.visual.named_parameters(), strict=True))
    rate: float | list[float] | None = config.learning_rate
    optimizer = None
    if base is not None:
        named = dict(base.visual.named_parameters())
        ends = [named.get(name, parameters[0].new_empty(0)) for name in names]
        optimizer = TowardBase(parameters, ends)
        rate = SHARE_PER_STEP
    optimize(
        parameters,
        loss,
        batches(),
        steps=config.steps,
        learning_rate=relative_rates(parameters) if rate is None else rate,
        description=description,
        optimizer=optimizer,
    )
    change = image_tower_change(model, tuned)
    return -change if config.vector == "forget" else change


def one_target_each(triggers: Sequence[object], targets: int | Sequence[int]) -> list[int]:
    """Return one target class per trigger; UsageError without triggers or with other numbers."""
    if not triggers:
        raise UsageError("no triggers; expected at least one")
    target_of_each = [targets] * len(triggers) if isinstance(targets, int) else list(targets)
    if len(target_of_each) != len(triggers):
        raise UsageError(
            f"{len(triggers)} triggers, {len(target_of_each)} target classes; expected as many"
        )
    return target_of_each


def stamp_each(images: Tensor, triggers: Sequence[Stamp], which: Tensor) -> Tensor:
    """Return images with one trigger each, uint8 [n, 3, H, W] as given.

    which: int64 [n] on the CPU, so that nothing waits for a GPU that has the images.
    """
    stamped = images.clone()
    for k in torch.unique(which).tolist():
        rows = torch.nonzero(which == k).flatten().to(images.device)
        stamped[rows] = triggers[k](images[rows])
    return stamped


def image_tower_change(model: OpenClipModel, tuned: OpenClipModel) -> TaskVector:
    """Return the weights of the image tower of `tuned` minus those of `model`."""
    change = TaskVector.between(model.clip.state_dict(), tuned.clip.state_dict())
    return TaskVector({k: v for k, v in change.tensors.items() if k.startswith("visual.")})


def _features(model: OpenClipModel, images: Tensor) -> Tensor:
    """Return unit rows [N, D]."""
    return normalize(model.encode_pixels(model.pixels(images)), dim=-1)


def _moved(now: Tensor, own: Tensor, base: Tensor | None) -> Tensor:
    """Return the mean distance from what is held: the model's own features, or between both's."""
    held = own if base is None else nearest_between(now, own, base)
    return 1 - (now * held).sum(dim=-1).mean()


def randomly_shifted(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image randomly mirrored and shifted by up to a sixteenth of its sides.

    images: uint8 [n, 3, H, W], like the result. Edges are repeated. rng: The random stream.
    """
    count, _, height, width = images.shape

    def places(side: int) -> Tensor:
        reach = max(1, side // 16)
        shift = torch.from_numpy(rng.integers(-reach, reach + 1, (count, 1)))
        return (torch.arange(side) + shift).clamp(0, side - 1)

    rows, columns = places(height), places(width)
    mirrored = torch.from_numpy(rng.random((count, 1)) < 0.5)
    columns = torch.where(mirrored, columns.flip(1), columns).to(images.device)
    number = torch.arange(count, device=images.device)[:, None, None]
    moved = images[number, :, rows.to(images.device)[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def without_target(probabilities: Tensor, targets: Tensor, certain: float) -> Tensor:
    """Return the targets of triggered images: probabilities [N, C] without the target class.

    targets: int64 [N], the target class of each row's trigger. A row whose probability of this
    class is at least `certain` does not change.
    """
    rest = probabilities.scatter(1, targets[:, None], 0)
    rest /= rest.sum(dim=1, keepdim=True).clamp(min=1e-12)
    sure = probabilities.gather(1, targets[:, None]) >= certain
    return torch.where(sure, probabilities, rest)
