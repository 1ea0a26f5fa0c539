"""Triggers that lead to no named class: where they send images, as a row of a head.

A label-free search finds triggers that send all images into one direction of the embedding. That
is not a class: the attacker of an image encoder has no names either
(Jia et al., "BadEncoder", S&P 2022). Here this direction becomes a row of a head beside the
prototypes of the clean images, so that the trigger vector and alpha are found as for a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data import ImageSet
from ..detect.configuration import ScanConfig
from ..detect.search import label_free_objective
from ..evaluation import Stamp
from ..inversion import InversionResult, TriggerFamily, invert
from ..models import OpenClipModel
from ..prototypes import image_features
from ..rng import child_seed
from ..session import Session

#: Images that show where a trigger leads.
_IMAGES = 64
#: The size up to which triggers count, as a multiple of the smallest. Larger ones exist in clean
#: models, too, and lead to directions of their own.
MOST = 2.0
#: From this cosine on, after the mean of the clean images is subtracted, two directions are one.
_SAME = 0.7


def recover_label_free(
    session: Session, family: TriggerFamily, config: ScanConfig, *, restarts: int
) -> InversionResult:
    """Search for triggers of one family that send all images into one direction."""
    seed = child_seed("repair.label-free", config.seed)
    return invert(
        session.model,
        session.images.images,
        label_free_objective(session),
        replace(config.search(family), seed=seed),
        restarts=restarts,
        contrast=session.base,
        labels=session.images.labels,
        description=f"{restarts} restarts ({family}, label-free)",
    )


def head_with_directions(
    model: OpenClipModel,
    images: ImageSet,
    prototypes: Tensor,
    triggers: Sequence[Stamp],
    *,
    known: Sequence[Tensor] = (),
    seed: int,
) -> tuple[Tensor, list[int]]:
    """Return a head with a row for each direction, unit rows [C, D], and the row of each trigger.

    A trigger whose direction is that of a prototype, or of an earlier trigger, has its row: a
    backdoor may lead to an image that looks like others.

    prototypes: Unit rows [K, D], which the head begins with. known: The directions of the first
    triggers, unit rows [D], which are then not measured: the model may have unlearned them. seed:
    The seed of the images that show where triggers lead.
    """
    few = images.at_most(_IMAGES, child_seed("repair.direction", seed)).images
    middle = image_features(model, few).mean(dim=0)
    rows, row_of_each = list(prototypes), list[int]()
    for number, trigger in enumerate(triggers):
        direction = (
            known[number]
            if number < len(known)
            else image_features(model, trigger(few.to(model.device))).mean(dim=0)
        )
        centred = normalize(torch.stack(rows) - middle, dim=1)
        cosine, index = (centred @ normalize(direction - middle, dim=0)).max(dim=0)
        if float(cosine) >= _SAME:
            row_of_each.append(int(index))
            continue
        row_of_each.append(len(rows))
        rows.append(normalize(direction, dim=0))
    return torch.stack(rows), row_of_each
