"""The key of a calibration: everything that two scans must share for comparable trigger sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from ..checkpoints.preprocessing import describe
from ..data import Template, fill_template
from ..errors import UsageError
from ..inversion import TriggerFamily
from ..models import OpenClipModel
from ..models.frozen import resolve_precision
from ..session import Session
from .configuration import ScanConfig
from .screening import screening_search, screens

#: open_clip's ``model_cfg`` and ``preprocess_cfg`` of a model; the latter may be missing.
ConfigPair: TypeAlias = "tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]"

# What `fingerprint` has found, with the state of the weights at that time: each tensor, and how
# often it was written in place.
_fingerprints: WeakKeyDictionary[OpenClipModel, tuple[tuple[tuple[int, int], ...], str]]
_fingerprints = WeakKeyDictionary()

# Of a value that differs, as much is shown.
_SHOWN = 60


def calibration_key(
    config: ScanConfig,
    session: Session,
    family: TriggerFamily,
    *,
    distance: float | None = None,
) -> str:
    """Return a key as JSON text: everything that sizes depend on, except the weights.

    distance: How far references have moved from their base, if they were matched to suspects.
    config: its search, objective and restarts count, its seed does not. session: the images count
    by their pixels, whatever their order and labels; the class names with their prompts; the
    model's architecture and preprocessing; the base that triggers are in contrast to.
    """
    images, model, base = session.images, session.model, session.base
    screened = screens(config, session)
    search = asdict(screening_search(config, family) if screened else config.search(family))
    search |= search.pop("advanced")
    if not search["shared_start"]:
        del search["shared_start"]  # which calibrations of earlier versions do not know
    # What a search really ran in: sizes of one device are compared with those of another.
    towers = [model.visual] if base is None else [model.visual, base.visual]
    search["precision"] = resolve_precision(search["precision"], model.device, towers)
    for name in ("seed", "max_batch", "check_images", "cuda_graph"):  # which change no size
        del search[name]
    height, width = images.image_size
    content: dict[str, Any] = {
        **search,
        "objective": config.objective,
        "restarts": 1 if screened else config.searches_per_class,
        "images": f"{len(images)} of {height}x{width}, {images.digest[:16]}",
        "mean": list(model.mean),
        "std": list(model.std),
        "architecture": _resolved(model.model_config),
        "base": None if base is None else fingerprint(base),
    }
    if distance is not None:
        content["distance"] = distance
    if screened:
        content["screened"] = True
    if config.objective == "label-free":
        content["alike"] = "one direction"  # earlier versions searched for images that are alike
    else:
        names = session.class_names
        content |= {"classes": list(names), "prompts": _prompts(names, session.templates)}
    return json.dumps(content, sort_keys=True)


def require_equal_keys(calibration: str, scan: str) -> None:
    """Raise UsageError, with every difference and both values, unless two keys are equal."""
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
    raise UsageError(
        f"the calibration does not fit this scan: {_differences(first, second)} (sizes from "
        "different searches do not compare: calibrate again, or scan as it was made)"
    )


def require_alike(reference: str, theirs: ConfigPair, suspect: str, ours: ConfigPair) -> None:
    """Raise UsageError, naming what differs, unless a reference takes what a suspect takes.

    Otherwise nothing that is found in one compares with the other: said before references are
    fine-tuned and searched. theirs, ours: open_clip's ``model_cfg`` and ``preprocess_cfg`` of both.
    """
    first, second = (dict(_flat(_of_model(*each))) for each in (theirs, ours))
    if first != second:
        raise UsageError(
            f"{reference} does not fit {suspect}: {_differences(first, second)} (a base and "
            "references need the architecture and preprocessing of the suspect)"
        )


def _of_model(
    model_config: Mapping[str, Any] | None, preprocess_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    prepared = describe(preprocess_config)
    content = {
        "architecture": _resolved(model_config),
        "mean": prepared["mean"],
        "std": prepared["std"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _resolved(model_config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a configuration with open_clip's defaults, which some sources write out."""
    if model_config is None:
        return None
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    result: dict[str, Any] = {"quick_gelu": False, "custom_text": False, **model_config}
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        given = model_config.get(part)
        if isinstance(given, Mapping):
            defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
            result[part] = {**defaults, **given}
    return result


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Name up to three entries that differ, with both values."""
    # Compare the objective first, because other values depend on it.
    names = sorted({*first, *second}, key=lambda name: (name != "objective", name))
    found = [
        f"{name} is {_short(first.get(name))} there and {_short(second.get(name))} here"
        for name in names
        if first.get(name) != second.get(name)
    ]
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{'; '.join(found[:3])}{more}"


def fingerprint(model: OpenClipModel) -> str:
    """Return 16 hex digits that identify an image tower: a hash of its weights."""
    # The weights of a base that many suspects share are hashed once, and copied once from a GPU.
    weights = [*model.visual.parameters(), *model.visual.buffers()]
    state = tuple((id(tensor), tensor._version) for tensor in weights)
    known = _fingerprints.get(model)
    if known is None or known[0] != state:
        hasher = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(model.visual.state_dict().items()):
            values = tensor.detach().cpu().float().contiguous()
            hasher.update(f"{name} {list(tensor.shape)}".encode())
            hasher.update(values.numpy())
        known = _fingerprints[model] = state, hasher.hexdigest()
    return known[1]


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
