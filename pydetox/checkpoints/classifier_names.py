"""Names of image classifiers: `timm:NAME`, `torchvision:NAME` and `backdoorbench:NAME`, with @SIZE.

The last layer of such a model is the head, and needs no texts.
"""

from __future__ import annotations

import re
from typing import Any

from pydetox.errors import UsageError

LIBRARIES = ("timm", "torchvision", "backdoorbench")
#: What BackdoorBench trains beside torchvision's models, with the size of its images.
BACKDOORBENCH = {
    "preactresnet18": 32,
    "preactresnet34": 32,
    "preactresnet50": 32,
    "vgg19": 32,
    "vgg16": 32,
    "vit_b_16": 32,
    "convnext_tiny": 32,
}
_NAME = re.compile(r"(?P<library>[a-z]+):(?P<name>[A-Za-z0-9_.\-]+)(?:@(?P<size>[1-9]\d{0,3}))?")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
#: What BackdoorBench normalises CIFAR-10 with.
_CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.243, 0.261]}


def is_classifier_name(text: str) -> bool:
    """Return whether a text is meant as such a name."""
    return text.partition(":")[0] in LIBRARIES and ":" in text


def classifier_config(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ``model_cfg`` and ``preprocess_cfg`` of a classifier's name.

    The number of classes and the width of the features are those of the weights, which
    `models.classifiers` looks up. How images are prepared is a guess: as for ImageNet, or for
    CIFAR-10 in BackdoorBench.

    Raises:
        UsageError: The library has no such model.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise UsageError(f"architecture {text!r}; expected LIBRARY:NAME or LIBRARY:NAME@SIZE")
    library, name, given = match["library"], match["name"], match["size"]
    prepared: dict[str, Any] = {**_IMAGENET, "resize_mode": "squash", "interpolation": "bilinear"}
    size = 224
    if library == "backdoorbench":
        known = name in BACKDOORBENCH
        size = BACKDOORBENCH.get(name, 32)
        prepared |= _CIFAR
    elif library == "timm":
        import timm

        known = timm.is_model(name)
        if known:
            told = timm.get_pretrained_cfg(name)
            if told is not None:
                size = int(told.input_size[-1])
                prepared |= {"mean": list(told.mean), "std": list(told.std)}
    else:
        from torchvision.models import list_models

        known = name in list_models()
    if not known:
        raise UsageError(f"architecture {text!r}: {library} has no model {name!r}")
    config = {
        "embed_dim": 1,
        "layout": "classifier",
        "vision_cfg": {
            "image_size": int(given or size),
            "library": library,
            "architecture": name,
        },
        "text_cfg": {},
    }
    return config, prepared
