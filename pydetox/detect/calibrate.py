"""Calibrating: searching clean references, whose trigger sizes a verdict compares with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..data import ImageSet, Template
from ..errors import UsageError
from ..inversion import InversionResult, TriggerFamily
from ..models import OpenClipModel
from ..rng import child_seed
from ..session import Session
from .configuration import ScanConfig
from .copies import fine_tuned_copies, numbered
from .key import calibration_key
from .screening import Screening, screen_classes, screens
from .search import search_classes, sizes_per_class
from .statistics import Calibration


def calibrate_references(
    base: OpenClipModel | None,
    images: ImageSet,
    *,
    references: Sequence[OpenClipModel] | None,
    templates: Sequence[Template] | None,
    config: ScanConfig,
    distance: float | None = None,
) -> Calibration:
    """Search clean references: given models, or fine-tuned copies of the base.

    config: `contrast` decides whether the searches are in contrast to the base. distance: How far
    from the base copies lie (see `copies.fine_tuned_copies`); None for given models, and for copies
    that `config.reference_training` describes. The other arguments are those of
    `pydetox.calibrate`. The copies differ in their seeds, and every search has its own seed. Raises
    DataError if copies cannot be trained because the images have no class names, OutOfReachError if
    they do not get to the distance, and UsageError without any model.
    """
    first = base if base is not None or not references else references[0]
    if first is None:
        raise UsageError("no base model, which a calibration without references= needs: give base=")
    contrast = base if config.contrast else None
    session = Session.open(first, images, templates=templates, base=contrast)
    models: Iterable[OpenClipModel] = (
        fine_tuned_copies(session, config, distance) if references is None else references
    )
    screened = screens(config, session)
    names, searched = list[str](), list[dict[TriggerFamily, InversionResult]]()
    screenings = list[dict[TriggerFamily, Screening]]()
    digests = list[str]()
    count = config.references if references is None else len(references)
    # A suspect is judged beside references of two distances, which must have nothing in common.
    place = () if distance is None else (f"{distance:g}",)
    for k, model in enumerate(models):
        seeded = replace(config, seed=child_seed("calibration.search", config.seed, k, *place))
        # A reference may have a text tower of its own; a copy has that of the base.
        of_model = replace(session, model=model)
        if references is None:
            of_model = session.with_image_tower_of(model)
        names.append(model.name)
        digests.append(model.image_tower_digest())
        described = f"{numbered(k, count, distance)}:"
        if screened:
            screenings.append(
                {
                    family: screen_classes(
                        of_model, seeded, family, description=f"{described} screening ({family})"
                    )
                    for family in config.families
                }
            )
            continue
        searched.append(
            {
                family: search_classes(
                    of_model, seeded, family, description=f"{described} inversion ({family})"
                )
                for family in config.families
            }
        )

    def calibration(family: TriggerFamily, others: tuple[Calibration, ...] = ()) -> Calibration:
        key = calibration_key(config, session, family, distance=distance)
        if screened:
            return Calibration(
                p_l1=tuple(one[family].effort for one in screenings),
                key=key,
                models=tuple(names),
                family=family,
                others=others,
                relative=bool(config.contrast),
                digests=tuple(digests),
                distance=distance,
                screened=True,
                tower_passes=sum(one[family].inversion.tower_passes for one in screenings),
            )
        found = [one[family] for one in searched]
        histories = [[sizes_per_class(then, config) for then in one.history] for one in found]
        return Calibration(
            p_l1=tuple(sizes_per_class(one.p_l1, config) for one in found),
            key=key,
            models=tuple(names),
            recorded_steps=config.inversion.recorded_steps,
            history=tuple(zip(*histories, strict=True)),
            family=family,
            others=others,
            relative=bool(config.contrast),
            digests=tuple(digests),
            distance=distance,
            tower_passes=sum(one.tower_passes for one in found),
        )

    first_family, *rest = config.families
    return calibration(first_family, tuple(calibration(family) for family in rest))
