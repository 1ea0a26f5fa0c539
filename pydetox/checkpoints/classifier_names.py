"""Names of image classifiers: `timm:NAME`, `torchvision:NAME` and `backdoorbench:NAME`, with @SIZE.

The last layer of such a model is the head, and needs no texts. Images are prepared as timm and
torchvision prepare them for their own weights of that name. A name of BackdoorBench may end in the
data set that it was trained on, `backdoorbench:preactresnet18@32:gtsrb`, which tells how images are
normalised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydetox.checkpoints.spelling import close_matches
from pydetox.errors import UsageError

LIBRARIES = ("timm", "torchvision", "backdoorbench")
#: Models that BackdoorBench trains, with the size of its images; torchvision's others have 32.
BACKDOORBENCH = {
    "preactresnet18": 32,
    "preactresnet34": 32,
    "preactresnet50": 32,
    "vgg19": 32,
    "vgg19_bn": 32,
    "vgg16": 32,
    "vit_b_16": 32,
    "convnext_tiny": 32,
}
_NAME = re.compile(
    r"(?P<library>[a-z]+):(?P<name>[A-Za-z0-9_.\-]+)(?:@(?P<size>[1-9]\d{0,3}))?"
    r"(?::(?P<data>[a-z0-9]+))?"
)
#: The size of the images of BackdoorBench's other data sets.
_SIZES = {"tiny": 64, "celeba": 64, "imagenet": 224}
_SCALING = {"interpolation": "bilinear", "resize_mode": "squash"}
#: What BackdoorBench normalises each of its data sets with.
NORMALISATIONS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.243, 0.261)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "mnist": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "tiny": {"mean": (0.4802, 0.4481, 0.3975), "std": (0.2302, 0.2265, 0.2262)},
    "gtsrb": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "celeba": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}


def is_classifier_name(text: str) -> bool:
    """Return whether a text is meant as such a name."""
    return text.partition(":")[0] in LIBRARIES and ":" in text


def classifier_config(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ``model_cfg`` and ``preprocess_cfg`` of a classifier's name.

    The number of classes and the width of the features are those of the weights, which
    `models.classifiers` looks up. The weights in a file need not be those that a library has under
    this name, so that how images are prepared is a guess: see `guessed_values`.

    Raises:
        UsageError: The library has no such model, or one that takes no square images.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise UsageError(f"architecture {text!r}; expected LIBRARY:NAME or LIBRARY:NAME@SIZE")
    library, name, given, data = match.group("library", "name", "size", "data")
    if data is not None and (library != "backdoorbench" or data not in NORMALISATIONS):
        raise UsageError(
            f"architecture {text!r}: no data set {data!r} of BackdoorBench is known; expected one "
            f"of {', '.join(NORMALISATIONS)}"
        )
    if library == "backdoorbench":
        known = name in BACKDOORBENCH or name in _torchvision_names()
    elif library == "timm":
        import timm

        known = timm.is_model(name)
    else:
        known = name in _torchvision_names()
    if not known:
        raise UsageError(
            f"architecture {text!r}: {library} has no model {name!r}"
            f"{close_matches(name, _names_of(library))}"
        )
    wanted = None if given is None else int(given)
    if library == "backdoorbench":
        size = wanted or _SIZES.get(data or "", BACKDOORBENCH.get(name, 32))
        prepared = _SCALING | {k: list(v) for k, v in NORMALISATIONS[data or "cifar10"].items()}
    else:
        size, prepared = (_of_timm if library == "timm" else _of_torchvision)(name, wanted)
    config = {
        "embed_dim": 1,
        "layout": "classifier",
        "vision_cfg": {
            "image_size": size,
            "library": library,
            "architecture": name,
        },
        "text_cfg": {},
    }
    return config, prepared


def named_classifiers(name: str) -> list[str]:
    """Return the names of classifiers that a name without its library may stand for."""
    plain = name.replace("/", ":")  # as in timm/resnet18
    asked = [plain] if is_classifier_name(plain) else [f"{one}:{name}" for one in LIBRARIES]
    return [
        one
        for one in asked
        if (match := _NAME.fullmatch(one)) and match["name"] in _names_of(match["library"])
    ]


def is_certain(text: str) -> bool:
    """Return whether a classifier's name tells how its images are normalised."""
    match = _NAME.fullmatch(text)
    return match is not None and match["data"] is not None


def guessed_values(text: str) -> tuple[str, ...]:
    """Return which values of a name's ``preprocess_cfg`` are a guess, by their names there.

    BackdoorBench scales all images in one way, and normalises those of each data set in another.
    """
    if is_certain(text):
        return ()
    if text.startswith("backdoorbench:"):
        return ("mean", "std")
    return ("mean", "std", "interpolation", "resize_mode")


def noted_name(notes: Mapping[str, str]) -> str | None:
    """Return the classifier's name that BackdoorBench's entries beside the weights stand for.

    notes: The entries `model_name` and `clean_data`. None if nothing of that name is known.
    """
    name = f"backdoorbench:{notes.get('model_name', '')}"
    data = notes.get("clean_data", "")
    try:
        classifier_config(name)
    except UsageError:
        return None
    return f"{name}:{data}" if data in NORMALISATIONS else name


def _names_of(library: str) -> Sequence[str]:
    """Return the names of a library's models."""
    if library == "timm":
        import timm

        found: Sequence[str] = timm.list_models()
        return found
    own = list(BACKDOORBENCH) if library == "backdoorbench" else []
    return [*own, *_torchvision_names()]


def _torchvision_names() -> Sequence[str]:
    """Return the image classifiers among torchvision's models."""
    import torchvision.models as every

    names: Sequence[str] = [
        *every.list_models(module=every),
        *every.list_models(module=every.quantization),
    ]
    return names


def _of_timm(name: str, size: int | None) -> tuple[int, dict[str, Any]]:
    """Return the size of images and how timm's `create_transform` prepares them for evaluation."""
    import timm
    from timm.data.config import resolve_data_config

    listed = timm.get_pretrained_cfg(name)
    told = {} if listed is None else listed.to_dict()  # type: ignore[no-untyped-call]
    asked = {"input_size": None if size is None else (3, size, size)}
    found = resolve_data_config(asked, told)  # type: ignore[no-untyped-call]
    channels, height, width = found["input_size"]
    if height != width or channels != 3:
        raise UsageError(
            f"architecture timm:{name}: takes images of {height}x{width} pixels and {channels} "
            "channels; expected square ones of 3 channels"
        )
    mean = list(found["mean"])
    prepared = {
        "mean": mean,
        "std": list(found["std"]),
        "interpolation": found["interpolation"],
        "resize_mode": {"squash": "squash", "border": "longest"}.get(
            found["crop_mode"], "shortest"
        ),
    }
    if found["crop_mode"] == "border":
        prepared["fill_color"] = round(255 * mean[0])
    scaled = math.floor(height / found["crop_pct"])
    return height, prepared if scaled == height else prepared | {"resize_size": scaled}


def _of_torchvision(name: str, size: int | None) -> tuple[int, dict[str, Any]]:
    """Return the size of images and how the transform of torchvision's default weights does it.

    At another size than theirs nothing is cut off beyond a square: torchvision names no margin.
    """
    from torchvision.models import get_model_weights

    imagenet = NORMALISATIONS["imagenet"]
    prepared: dict[str, Any] = _SCALING | {k: list(v) for k, v in imagenet.items()}
    weights = get_model_weights(name)
    if not len(weights):
        return size or 224, prepared
    told = weights["DEFAULT"].transforms()
    (scaled,), (own,) = told.resize_size, told.crop_size
    prepared = {
        "mean": list(told.mean),
        "std": list(told.std),
        "interpolation": told.interpolation.value,
        "resize_mode": "shortest",
    }
    if size in (None, own) and scaled != own:
        prepared["resize_size"] = scaled
    return size or own, prepared
