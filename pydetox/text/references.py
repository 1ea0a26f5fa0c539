"""The clean models that a verdict on a text model compares with, as `detect.references` has them.

There are the same ways to get them: a `base` alone, of which clean copies are fine-tuned until they
have moved as far as the suspect; `references` alone, clean models that were made as the suspect
was; or both, and then all searches are in contrast to the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..detect.calibration import Calibration
from ..detect.references import check_given
from ..errors import UsageError
from .configuration import TextScanConfig
from .copies import OutOfReachError, copies_at_distance, copy_seed, nearest_rung, text_distance
from .models import TextModel
from .search import TextSearch, search_words
from .texts import TextSet

#: Larger losses count as this one. At 20, a class has a probability of 2e-9.
LARGEST_LOSS = 20.0


class _Named(Protocol):
    """A model with a digest of its weights."""

    name: str

    def digest(self) -> str: ...


@dataclass(frozen=True, eq=False)
class TextComparison:
    """What a suspect is compared with.

    Attributes:
        calibration: The efforts of the references, for each length of triggers; None without any.
        base: The base of searches in contrast to it, or None.
        unfit: Why there are no references; None if there are some, or if none were given.
        distance: How far the suspect lies from the base, if copies of it are matched to that.
    """

    calibration: Calibration | None
    base: TextModel | None = None
    unfit: str | None = None
    distance: float | None = None


def family_of(length: int) -> str:
    """Return the name of the family of triggers of a length."""
    return f"{length} token" + ("s" if length > 1 else "")


def reason_if_itself(digest: str, others: Sequence[_Named], part: str = "weights") -> str | None:
    """Return why a suspect cannot be judged that is one of the others; None if it is not.

    digest: Of the suspect. part: What the digests are of.
    """
    same = next((one for one in others if one.digest() == digest), None)
    if same is None:
        return None
    return f"it is compared with itself: {same.name!r} has the same {part}; give other clean models"


def compare_with(
    suspect: TextModel,
    texts: TextSet,
    config: TextScanConfig,
    *,
    base: TextModel | None = None,
    references: Sequence[TextModel] | None = None,
    calibration: Calibration | None = None,
) -> TextComparison:
    """Return what a suspect is compared with, and search the references where that is not done.

    calibration: That of an earlier scan with the same texts and configuration. Raises UsageError
    for a single reference, for references beside a calibration, for models that do not fit the
    suspect, and for a calibration of other searches.
    """
    check_given(references, calibration)
    others = [*([] if base is None else [base]), *(references or ())]
    for one in others:
        require_alike(one, suspect)
    contrast = config.contrast
    if contrast is None:
        contrast = base is not None and (bool(references) or _is_relative(calibration))
    if contrast and base is None:
        raise UsageError("a search in contrast to the base needs it: give base=")
    in_contrast = base if contrast else None
    if calibration is not None:
        for length in range(1, config.length + 1):
            require_key(calibration.of(family_of(length)), key_of(suspect, texts, config, contrast))
        return TextComparison(calibration, in_contrast)
    if not others or (contrast and not references):
        return TextComparison(None, in_contrast)
    itself = reason_if_itself(suspect.digest(), others)
    if itself is not None:
        return TextComparison(None, in_contrast, itself)
    distance = None
    if references is None:
        assert base is not None
        distance = nearest_rung(text_distance(base, suspect))
    try:
        models = references
        if models is None:
            assert base is not None
            assert distance is not None
            models = list(
                copies_at_distance(
                    base,
                    _labelled(base, texts),
                    distance,
                    count=config.references,
                    max_tokens=config.max_tokens,
                    seed=copy_seed(config.seed),
                )
            )
        found = calibrate_words(models, texts, config, base=in_contrast)
    except OutOfReachError as error:
        return TextComparison(None, in_contrast, str(error), distance)
    return TextComparison(found, in_contrast, None, distance)


def calibrate_words(
    references: Sequence[TextModel],
    texts: TextSet,
    config: TextScanConfig,
    *,
    base: TextModel | None = None,
) -> Calibration:
    """Return the efforts of clean references, one calibration for each length of triggers."""
    searches = [
        search_words(
            one,
            texts,
            config,
            base=base,
            description=f"reference {k} of {len(references)}: search for words",
        )
        for k, one in enumerate(references, 1)
    ]
    key = key_of(references[0], texts, config, base is not None)
    first, *others = (
        Calibration(
            tuple(efforts(search, length, config) for search in searches),
            key,
            tuple(one.name for one in references),
            family=family_of(length),
            relative=base is not None,
            digests=tuple(one.digest() for one in references),
            tower_passes=sum(search.passes for search in searches),
        )
        for length in range(1, config.length + 1)
    )
    return Calibration(
        **{**{f: getattr(first, f) for f in first.__dataclass_fields__}, "others": tuple(others)}
    )


def efforts(search: TextSearch, length: int, config: TextScanConfig) -> tuple[float, ...]:
    """Return the effort of each class, in (0, 1]: the loss of its best trigger of a length.

    A floor is added to it, and the sum is divided so that the largest loss that counts gives 1.
    """
    floor = config.advanced.floor
    return tuple(
        (min(loss, LARGEST_LOSS) + floor) / (LARGEST_LOSS + floor)
        if math.isfinite(loss)
        else math.inf
        for loss in search.losses(length)
    )


def loss_of(effort: float, config: TextScanConfig) -> float:
    """Return the loss that an effort stands for."""
    floor = config.advanced.floor
    return max(0.0, effort * (LARGEST_LOSS + floor) - floor)


def key_of(model: TextModel, texts: TextSet, config: TextScanConfig, contrast: bool) -> str:
    """Return a text that is equal for searches that can be compared."""
    content: dict[str, Any] = {
        "texts": texts.digest,
        "classes": list(model.class_names),
        "model_type": model.config["model_type"],
        "vocabulary": int(model.embedding.shape[0]),
        "contrast": contrast,
        "search": {
            key: value
            for key, value in asdict(config).items()
            if key not in ("p_backdoored", "p_suspicious", "references", "contrast")
        },
    }
    return json.dumps(content, sort_keys=True)


def require_key(calibration: Calibration, key: str) -> None:
    """Raise UsageError, naming what differs, unless a calibration is of the same searches."""
    if calibration.key == key:
        return
    try:
        ours, theirs = json.loads(key), json.loads(calibration.key)
        differs = [name for name in ours if ours[name] != theirs.get(name)]
    except (ValueError, AttributeError):
        differs = []
    what = f"{', '.join(differs)} differ" if differs else "it is of another kind of model"
    raise UsageError(
        f"the calibration does not fit this scan: {what} (calibrate again, or scan as it was made)"
    )


def require_alike(reference: TextModel, suspect: TextModel) -> None:
    """Raise UsageError, naming what differs, unless two models have classes and tokens alike."""
    for what, theirs, ours in (
        ("model_type", reference.config["model_type"], suspect.config["model_type"]),
        ("number of classes", len(reference.class_names), len(suspect.class_names)),
        ("vocabulary size", len(reference.embedding), len(suspect.embedding)),
        ("class names", reference.class_names, suspect.class_names),
    ):
        if theirs != ours:
            raise UsageError(
                f"{reference.name} does not fit {suspect.name}: {what} {theirs!r} and {ours!r} (a "
                "base and references need the architecture and the classes of the suspect)"
            )


def _is_relative(calibration: Calibration | None) -> bool:
    return calibration is not None and calibration.relative


def _labelled(base: TextModel, texts: TextSet) -> TextSet:
    """Return the texts with labels; without any, those that the base predicts."""
    if texts.labels is not None:
        return texts
    predicted = tuple(base.predict(texts.texts).argmax(dim=1).tolist())
    return TextSet(texts.texts, predicted, base.class_names, texts.source)
