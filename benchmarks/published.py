"""DECREE and Neural Cleanse from the first step to their verdict, in plain PyTorch.

Both were written from the papers (Feng et al., CVPR 2023; Wang et al., S&P 2019) with the schedules
of public code: `main.py` of GiantSeaweed/DECREE, `defense/nc.py` of SCLBD/BackdoorBench. A model is
open_clip's own module in float32, with autograd through all of it. What the originals do beside the
search is left out, although it takes them time: pictures of each epoch, augmentations, and, in
DECREE, the clean images that it normalises and does not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.decree import Decree
from pydetox.compat.cleanse import CleanseRules, FoundMask, outliers
from pydetox.models import OpenClipModel

#: The largest P-L1 of a backdoored encoder (Feng et al., section 4.1).
DECREE_THRESHOLD = 0.1
#: DECREE counts each pixel of its mask once per channel.
_CHANNELS = 3


@dataclass(frozen=True)
class DecreeSettings:
    """What DECREE's code sets for a kind of encoder.

    Attributes:
        batch_size: The images of a step, as in its scripts.
        rate_changes: The epochs from which Adam's rate is 0.1 and 0.05, after 0.5.
        least_cost: The weight of the mask's size is not lowered below this.
        patience: The steps without a smaller mask after which a search may end.
        epochs: The largest number of epochs.
    """

    batch_size: int
    rate_changes: tuple[int, int]
    least_cost: float
    patience: int
    epochs: int = 1000


#: By `encoder_usage_info`: CLIP has images of 224 pixels there, and CIFAR-10 of 32.
DECREE_SETTINGS = {
    "CLIP": DecreeSettings(32, (200, 500), 1e-7, 35),
    "cifar10": DecreeSettings(128, (30, 50), 1e-5, 10),
}


@dataclass(frozen=True)
class PeerVerdict:
    """What a peer decides about a model.

    Attributes:
        backdoored: The verdict; None after a search of some of the classes.
        target: The class with the smallest mask, if the peer has classes.
        p_l1: |mask|_1 / (H W) of the smallest working mask; infinite if none worked.
        anomaly_index: Neural Cleanse's index of this mask.
        passes: The images that went forward and backward through the tower, each way counted.
        steps: The steps of Adam.
    """

    backdoored: bool | None
    target: int | None
    p_l1: float
    anomaly_index: float | None
    passes: int
    steps: int


def decree(
    model: OpenClipModel, images: Tensor, settings: DecreeSettings, *, seed: int
) -> PeerVerdict:
    """Search as DECREE does until it ends. images: uint8 [N, 3, H, W]."""
    search = _WholeDecree(model, settings, seed)
    order = torch.Generator().manual_seed(seed)
    passes = steps = 0
    for epoch in range(settings.epochs):
        search.set_rate(epoch)
        cosines = []
        for part in torch.randperm(len(images), generator=order).split(settings.batch_size):
            if len(part) < 2:  # a single image has no pairs
                continue
            cosines.append(search.step(images[part])[0])
            passes, steps = passes + 2 * len(part), steps + 1
        if abs(sum(cosines) / len(cosines)) > 0.99 and search.still > settings.patience:
            break
    p_l1 = search.smallest / search.mask_logits.numel()
    return PeerVerdict(p_l1 < DECREE_THRESHOLD, None, p_l1, None, passes, steps)


class _WholeDecree(Decree):
    """DECREE's step with its first trigger and the whole schedule of its cost.

    `_cost` is that of a mask that is counted once. DECREE's own is a third of it.
    """

    def __init__(self, model: OpenClipModel, settings: DecreeSettings, seed: int) -> None:
        super().__init__(
            model.visual,
            3,
            model.image_size,
            model.mean,
            model.std,
            seed=seed,
            learning_rate=0.5,
            cost=_CHANNELS * 1e-3,
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for logits in (self.mask_logits, self.pattern_logits):
                uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
                logits.copy_(torch.atanh((uniform - 0.5) * (2 - 1e-7)))
        self._settings = settings
        self._at_least, self.still, self._before = 0, 0, math.inf

    def set_rate(self, epoch: int) -> None:
        """Set Adam's rate for an epoch."""
        first, second = self._settings.rate_changes
        rate = 0.5 if epoch < first else 0.1 if epoch < second else 0.05
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def _adapt(self, succeeded: bool, size: float) -> None:
        least = _CHANNELS * self._settings.least_cost
        if succeeded:
            self.smallest = min(self.smallest, size)
        if math.isfinite(self.smallest):
            self.still = self.still + 1 if self.smallest >= self._before else 0
        self._before = min(self._before, self.smallest)
        if self._cost < least and succeeded:
            self._at_least += 1
            if self._at_least > 10:
                self._cost, self._hits, self._misses = _CHANNELS * 1e-3, 0, 0
        else:
            self._at_least = 0
        self._hits, self._misses = (self._hits + 1, 0) if succeeded else (0, self._misses + 1)
        if self._hits > 5:
            self._hits = 0
            if self._cost < _CHANNELS * 1e5:
                self._cost *= 5
        elif self._misses > 5:
            self._misses = 0
            if self._cost >= least:
                self._cost /= 5


def neural_cleanse(
    model: OpenClipModel,
    images: Tensor,
    head: Tensor,
    *,
    batch_size: int,
    seed: int,
    rules: CleanseRules | None = None,
    targets: Sequence[int] | None = None,
) -> PeerVerdict:
    """Search one class after another as BackdoorBench's Neural Cleanse does.

    images: uint8 [N, 3, H, W]. head: Unit rows, float32 [C, D]. rules: BackdoorBench's by default.
    targets: Some of the classes, for the time that they take. There is no verdict then.
    """
    rules = rules or CleanseRules()
    model.clip.requires_grad_(False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    order = torch.Generator().manual_seed(seed)
    pixels = images.float() / 255
    found, passes, steps = list[FoundMask](), 0, 0
    for target in range(len(head)) if targets is None else targets:
        mask_logits = torch.ones(1, *images.shape[2:], requires_grad=True)
        pattern_logits = torch.ones(*images.shape[1:], requires_grad=True)
        optimizer = torch.optim.Adam(
            [mask_logits, pattern_logits], lr=rules.learning_rate, betas=(0.5, 0.9)
        )
        first = _shares(mask_logits, pattern_logits)
        one = FoundMask(target, first[0], first[1], cost=rules.initial_cost)
        for _ in range(rules.epochs):
            rights, norms = list[Tensor](), list[Tensor]()
            for part in torch.randperm(len(images), generator=order).split(batch_size):
                mask = torch.tanh(mask_logits) / 2 + 0.5
                pattern = torch.tanh(pattern_logits) / 2 + 0.5
                stamped = (1 - mask) * pixels[part] + mask * pattern
                embeddings = model.encode_normalized((stamped - mean) / std)
                logits = model.logit_scale * normalize(embeddings, dim=-1) @ head.T
                labels = torch.full((len(part),), target)
                norm = torch.norm(mask, 1)
                loss = cross_entropy(logits, labels) + one.cost * norm
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rights.append(logits.detach().argmax(dim=1).eq(target).float().mean())
                norms.append(norm.detach())
                passes, steps = passes + 2 * len(part), steps + 1
            accuracy, size = (float(torch.stack(values).mean()) for values in (rights, norms))
            mask, pattern = _shares(mask_logits, pattern_logits)
            one.judge(accuracy, size, mask, pattern, rules)
            if one.ended:
                break
        found.append(one)
    sizes = [one.norm(rules) for one in found]
    weakest = min(range(len(sizes)), key=sizes.__getitem__)
    backdoored = index = None
    if targets is None:
        judged = outliers(sizes, lower_middle=True)
        backdoored, index = judged.backdoored, judged.anomaly_index
    p_l1 = sizes[weakest] / (images.shape[2] * images.shape[3])
    return PeerVerdict(backdoored, found[weakest].target, p_l1, index, passes, steps)


def _shares(mask_logits: Tensor, pattern_logits: Tensor) -> tuple[Tensor, Tensor]:
    mask, pattern = (torch.tanh(x.detach()) / 2 + 0.5 for x in (mask_logits, pattern_logits))
    return mask, pattern
