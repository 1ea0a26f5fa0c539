"""BadCLIP: a patch whose embedding is close to the target's text before any poisoning."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ...errors import DataError, UsageError
from ...models import OpenClipModel
from ...progress import Progress
from ...rng import generator
from .patches import patch_side
from .triggers import PatchTrigger


def optimised_patch(
    base: OpenClipModel,
    images: Tensor,
    direction: Tensor,
    *,
    seed: int,
    steps: int = 200,
    learning_rate: float = 0.1,
    batch_size: int = 64,
    patch_size: int | None = None,
) -> PatchTrigger:
    """Return a centred patch with which images look to the clean model like the target's text.

    Adam maximises the mean cosine of f(stamped x) and the text embedding over the patch's logits
    (the patch is their sigmoid). base: The clean model that the victim will be fine-tuned from.
    images: uint8 [N, 3, H, W]. direction: The embedding of the target's text, a unit vector [D].
    patch_size: The side in pixels; default as in `badnets`. seed: The seed of the initial patch and
    the batches. Source: Liang et al., "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal
    Contrastive Learning" (CVPR 2024): its textual embedding consistency; its visual terms are left
    out. Raises DataError without images, UsageError for a patch that does not fit.
    """
    if not len(images):
        raise DataError("no images; a patch is optimised on at least one")
    if steps < 1 or batch_size < 1:
        raise UsageError(f"steps {steps}, batch_size {batch_size}; expected at least 1 each")
    side = patch_side(base.image_size, patch_size)
    top = (base.image_size - side) // 2
    rng = generator("attacks.badclip", seed)
    start = torch.from_numpy(rng.normal(0.0, 1.0, (3, side, side))).float()
    logits = start.to(base.device).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    margin = base.image_size - side - top
    inside = pad(torch.ones(side, side, device=base.device), (top, margin, top, margin))
    with Progress("optimising the patch", steps) as progress:
        for _ in range(steps):
            chosen = rng.choice(len(images), min(batch_size, len(images)), replace=False)
            pixels = base.pixels(images[torch.from_numpy(chosen)])
            patch = pad(logits.sigmoid(), (top, margin, top, margin))
            stamped = (1 - inside) * pixels + patch
            cosine = normalize(base.encode_pixels(stamped), dim=-1) @ direction
            optimizer.zero_grad()
            (-cosine.mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.update(1)
    pattern = (255 * logits.detach().sigmoid()).round().to("cpu", torch.uint8)
    return PatchTrigger(pattern, top, top)
