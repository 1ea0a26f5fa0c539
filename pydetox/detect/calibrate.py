"""Calibrating: searching clean references, whose trigger sizes a verdict compares with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..data import ImageSet, Template
from ..errors import UsageError
from ..evaluation import predict
from ..inversion import InversionResult, TriggerFamily
from ..models import OpenClipModel
from ..rng import child_seed
from ..session import Session
from ..training import train_on_prompts
from .configuration import ScanConfig
from .key import calibration_key
from .search import search_classes, sizes_per_class
from .statistics import Calibration


def calibrate_references(
    base: OpenClipModel | None,
    images: ImageSet,
    *,
    references: Sequence[OpenClipModel] | None,
    templates: Sequence[Template] | None,
    config: ScanConfig,
) -> Calibration:
    """Search clean references: given models, or the base and fine-tuned copies of it.

    config: `contrast` decides whether the searches are in contrast to the base. The other arguments
    are those of `pydetox.calibrate`. The copies differ in their seeds, and every search has its own
    seed. Raises DataError if copies cannot be trained because the images have no class names, and
    UsageError without any model.
    """
    first = base if base is not None or not references else references[0]
    if first is None:
        raise UsageError("no base model, which a calibration without references= needs: give base=")
    contrast = base if config.contrast else None
    session = Session.open(first, images, templates=templates, base=contrast)
    models = _copies(session, config) if references is None else references
    names, searched = list[str](), list[dict[TriggerFamily, InversionResult]]()
    digests = list[str]()
    count = config.references if references is None else len(references)
    for k, model in enumerate(models):
        seeded = replace(config, seed=child_seed("calibration.search", config.seed, k))
        # A reference may have a text tower of its own; a copy has that of the base.
        of_model = replace(session, model=model)
        if references is None:
            of_model = session.with_image_tower_of(model)
        searched.append(
            {
                family: search_classes(
                    of_model,
                    seeded,
                    family,
                    description=f"reference {k + 1} of {count}: inversion ({family})",
                )
                for family in config.searched
            }
        )
        names.append(model.name)
        digests.append(model.image_tower_digest())

    def calibration(family: TriggerFamily, others: tuple[Calibration, ...] = ()) -> Calibration:
        found = [one[family] for one in searched]
        histories = [[sizes_per_class(then, config) for then in one.history] for one in found]
        return Calibration(
            p_l1=tuple(sizes_per_class(one.p_l1, config) for one in found),
            key=calibration_key(config, session, family),
            models=tuple(names),
            recorded_steps=config.inversion.recorded_steps,
            history=tuple(zip(*histories, strict=True)),
            family=family,
            others=others,
            relative=bool(config.contrast),
            digests=tuple(digests),
        )

    first_family, *rest = config.searched
    return calibration(first_family, tuple(calibration(family) for family in rest))


def _copies(session: Session, config: ScanConfig) -> Iterator[OpenClipModel]:
    """Yield the base and copies of it that are fine-tuned on the images, each with its seed."""
    base, labelled = session.model, session.images
    head = None
    if config.objective == "label-free" and not session.has_head:
        # The model's own groups of images stand for classes that nobody has named.
        head = session.prototypes
        groups = predict(base, labelled.images, head)
        labelled = replace(labelled, labels=groups, class_names=None)
    elif labelled.labels is None:
        labelled = replace(labelled, labels=predict(base, labelled.images, session.head))
    yield base
    for k in range(1, config.references):
        seed = child_seed("calibration.training", config.seed, k)
        copy = train_on_prompts(
            base,
            labelled,
            session.templates,
            replace(config.reference_training, seed=seed),
            head=head,
            description=f"reference {k + 1} of {config.references}: fine-tuning",
        )
        copy.name = f"{base.name}, fine-tuned {k}"
        yield copy
