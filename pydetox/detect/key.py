"""The key of a calibration: what two scans must share for the sizes of triggers to compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..data import ImageSet, Template, fill_template
from ..errors import UsageError
from ..models import OpenClipModel

# Of a value that differs, as much is shown.
_SHOWN = 60


def search_key(
    search: Mapping[str, Any],
    images: ImageSet,
    model: OpenClipModel,
    *,
    class_names: Sequence[str] | None,
    templates: Sequence[Template],
    base: OpenClipModel | None = None,
) -> str:
    """Return a key as JSON text: an object of everything that sizes depend on but the weights.

    Args:
        search: Objective, family, restarts and the settings of the search.
        images: The clean images; their pixels count, their order and labels do not.
        model: Gives the architecture and the preprocessing.
        class_names: The classes searched for, whose prompts count; None in a label-free scan.
        templates: The prompts.
        base: What triggers are in contrast to, or None.
    """
    height, width = images.image_size
    content: dict[str, Any] = {
        **search,
        "images": f"{len(images)} of {height}x{width}, {images.digest[:16]}",
        "classes": None if class_names is None else list(class_names),
        "prompts": None if class_names is None else _prompts(class_names, templates),
        "mean": list(model.mean),
        "std": list(model.std),
        "architecture": model.model_config,
        "base": None if base is None else fingerprint(base),
    }
    return json.dumps(content, sort_keys=True)


def require_equal_keys(calibration: str, scan: str) -> None:
    """Raise UsageError, naming what differs and both values, unless two keys are equal."""
    if calibration == scan:
        return
    try:
        first, second = dict(_flat(json.loads(calibration))), dict(_flat(json.loads(scan)))
    except ValueError:
        first, second = {}, {}
    if not first:
        raise UsageError(
            "the calibration does not say what it depends on: an earlier version made it; "
            "calibrate again"
        )
    # The objective first: much else follows from it.
    names = sorted({*first, *second}, key=lambda name: (name != "objective", name))
    found = [
        f"{name} is {_short(first.get(name))} there and {_short(second.get(name))} here"
        for name in names
        if first.get(name) != second.get(name)
    ]
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    raise UsageError(
        f"the calibration does not fit this scan: {'; '.join(found[:3])}{more} (sizes from "
        "different searches do not compare: calibrate again, or scan as it was made)"
    )


def fingerprint(model: OpenClipModel) -> str:
    """Return 16 hex digits that tell an image tower from another one: a hash of its weights."""
    hasher = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.visual.state_dict().items()):
        values = tensor.detach().cpu().float().contiguous()
        hasher.update(f"{name} {list(tensor.shape)}".encode())
        hasher.update(values.numpy())
    return hasher.hexdigest()


def _prompts(class_names: Sequence[str], templates: Sequence[Template]) -> str:
    filled = [[fill_template(template, name) for template in templates] for name in class_names]
    digest = hashlib.sha256(json.dumps(filled).encode()).hexdigest()
    first = f", such as {filled[0][0]!r}" if filled and filled[0] else ""
    return f"{len(templates)} per class{first}, {digest[:16]}"


def _flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    elif name:
        yield name, content


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
