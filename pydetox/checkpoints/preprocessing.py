"""How images are prepared for a model, and which source says so.

A wrong mean or a wrong way of scaling costs most of a model's accuracy without any error. Therefore
results record the source of the values, and a warning names the values that are a guess.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydetox.checkpoints.architecture import (
    Config,
    check_preprocess_config,
    read_config,
    resolve_model,
)
from pydetox.checkpoints.classifier_names import guessed_values, is_classifier_name
from pydetox.checkpoints.layout import PROCESSOR_NAMES, TRANSFORMERS_CONFIG_NAME
from pydetox.checkpoints.processors import read_processor
from pydetox.checkpoints.transformers_layouts import read_transformers_config
from pydetox.errors import ArchitectureError, CheckpointError

#: open_clip's names of the values (`PreprocessCfg` in its transform.py), and whose transform it is.
KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color", "library")


@dataclass(frozen=True)
class Configuration:
    """What a model is and how its images are prepared.

    Attributes:
        model_config: open_clip's ``model_cfg``; ``None`` if no source names the architecture.
        preprocess_config: open_clip's ``preprocess_cfg``; ``None`` if no source has it. open_clip
            then takes that of OpenAI's CLIP.
        preprocess_source: The source of ``preprocess_config``, for results and messages.
        warnings: One line for each value that is a guess and each source that was passed over.
        preprocess_is_own: Whether ``preprocess_config`` comes from the checkpoint itself.
        named: The user's name of the architecture if the checkpoint has none; else ``None``.
    """

    model_config: Config | None
    preprocess_config: Config | None
    preprocess_source: str
    warnings: tuple[str, ...] = ()
    preprocess_is_own: bool = False
    named: str | None = None


def configure(
    reference: str,
    *,
    listed: tuple[Config | None, Config | None] | None,
    config_file: Path | None,
    processor_file: Path | None,
    model: str | None,
    preprocess: Mapping[str, Any] | None,
) -> Configuration:
    """Decide what a checkpoint is; see `CheckpointIdentity.configured`, which has the arguments.

    Raises what `CheckpointIdentity.configured` raises.
    """
    warnings: list[str] = []
    model_config: Config | None = None
    found: Preparation | None = None
    if listed is not None:
        model_config, stated = listed
        found = Preparation(stated or {}, f"open_clip's tag {reference}")
    elif config_file is not None and os.path.lexists(config_file):
        try:
            model_config, found = _read_own(config_file, processor_file, model, preprocess)
        except CheckpointError as error:
            if model is None:
                raise
            if not _is_that_file(model, config_file):
                warnings.append(
                    f"{error}; the architecture that was named, {model}, is taken instead"
                )
    own = found is not None
    named: str | None = None
    if model is not None:
        other, stated = resolve_model(model)
        if model_config is not None and differs(model_config, other):
            who = "its entry in open_clip's list" if config_file is None else config_file.name
            warnings.append(
                f"{reference}: {who} tells another architecture than {model}, which was named; it "
                "is of the weights and counts"
            )
        named = None if model_config is not None else model
        model_config = model_config or other
        if found is None and stated is not None and is_classifier_name(os.fspath(model)):
            found = _of_classifier(os.fspath(model), other["vision_cfg"]["library"], stated)
        elif found is None and stated is not None:
            found = Preparation(stated, f"{os.fspath(model)}")
        elif found is None:
            found = preparation_of(model)
    if found is None:
        found = Preparation({}, "open_clip's default")
    given = {k: v for k, v in (preprocess or {}).items() if v is not None}
    source = found.source
    if given:
        source = "given" if set(KEYS[:4]) <= set(given) else f"{source}; {', '.join(given)} given"
    stated = dict(found.config)
    if "resize_mode" in given or (model_config or {}).get("layout") != "classifier":
        # It belongs to the mode that it came with, and open_clip has no such value.
        stated.pop("resize_size", None)
    config = {**stated, **given}
    open_ = [key for key in found.guessed if key not in given]
    if open_:
        shown = [_shown(key, config) for key in open_] if found.shows_values else open_
        warnings.append(
            f"{reference}: {found.why}: {', '.join(shown)} are a guess; image_mean=, image_std=, "
            "interpolation= and resize_mode= tell them"
        )
    try:
        check_preprocess_config(config)
    except ArchitectureError as error:
        raise ArchitectureError(f"{reference}: {error} (from {source})") from error
    return Configuration(model_config, config or None, source, tuple(warnings), own, named)


@dataclass(frozen=True)
class Preparation:
    """How images are prepared, as one source tells it.

    Attributes:
        config: open_clip's ``preprocess_cfg``.
        source: The name of the source.
        guessed: The values that are a guess.
        why: The reason why they are a guess.
        shows_values: Whether a warning shows the guessed values, which `why` does not.
    """

    config: Config
    source: str
    guessed: tuple[str, ...] = ()
    why: str = ""
    shows_values: bool = False


def _of_classifier(name: str, library: str, stated: Config) -> Preparation:
    """Return what a classifier's name stands for; see `classifier_names`."""
    guessed = guessed_values(name)
    if not guessed:
        return Preparation(stated, name)
    if library == "backdoorbench":
        why = f"nothing tells how images are normalised for {name}, and CIFAR-10's way stands in"
        return Preparation(stated, f"what is usual for {name}", guessed, why, True)
    why = f"nothing tells how images are prepared for {name}, and {library}'s way for its own "
    why += "weights of that name stands in"
    return Preparation(stated, f"{library}'s own weights of {name}", guessed, why, True)


def _shown(key: str, config: Mapping[str, Any]) -> str:
    """Return a guessed value of a classifier with its name."""
    value = config[key]
    if isinstance(value, list):
        return f"{key} {','.join(f'{number:.4g}' for number in value)}"
    size = config.get("resize_size") if key == "resize_mode" else None
    return f"{key} {value}" + ("" if size is None else f" (scaled to {size} before the crop)")


def preparation_of(model: str) -> Preparation:
    """Return how open_clip prepares images for the pretrained weights of an architecture.

    If its tags differ, the values that most of them have are a guess.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    found = {}
    for tag in list_pretrained_tags_by_model(model):
        listed = get_pretrained_cfg(model, tag)
        found[tag] = {k: _plain(listed[k]) for k in KEYS if listed.get(k) is not None}
    if not found:
        why = f"nothing tells how images are prepared for {model}, and OpenAI's CLIP stands in"
        return Preparation({}, "open_clip's default", KEYS[:4], why)
    counts = Counter(json.dumps(one, sort_keys=True) for one in found.values())
    config: Config = json.loads(counts.most_common(1)[0][0])
    others = {tag: one for tag, one in found.items() if one != config}
    if not others:
        return Preparation(config, f"open_clip's pretrained tags of {model}")
    differing = {t: {k: v for k, v in one.items() if v != config[k]} for t, one in others.items()}
    shown = "; ".join(
        f"{tag} has {' and '.join(f'{key} {value}' for key, value in one.items())}"
        for tag, one in differing.items()
    )
    return Preparation(
        config,
        f"most of open_clip's pretrained tags of {model}",
        tuple(key for key in KEYS if any(key in one for one in differing.values())),
        f"open_clip's pretrained tags of {model} differ ({shown}), and what most have stands in",
    )


def _read_own(
    config_file: Path,
    processor_file: Path | None,
    model: str | None,
    preprocess: Mapping[str, Any] | None,
) -> tuple[Config, Preparation | None]:
    """Read the configuration beside the weights; None for how images are prepared if it is silent.

    Raises ArchitectureError where a folder of transformers does not tell that, and neither a name
    nor the user does: with a guessed mean the model would see other pixels than its owner's.
    """
    if config_file.name != TRANSFORMERS_CONFIG_NAME:
        model_config, stated = read_config(config_file)
        return model_config, Preparation(stated, config_file.name) if stated else None
    model_config = read_transformers_config(config_file)
    size, kind = model_config["vision_cfg"]["image_size"], model_config.get("layout", "clip")
    told = None if processor_file is None else read_processor(processor_file, size, kind)
    if processor_file is None or told is None:
        if model is None and not {"mean", "std"} <= set(preprocess or ()):
            raise ArchitectureError(
                f"{config_file}: nothing beside it tells how images are prepared; put the "
                f"processor's {PROCESSOR_NAMES[0]} there, or name the architecture with model= to "
                "use what open_clip's pretrained tags of it say, or give image_mean= and image_std="
            )
        return model_config, None
    other = config_file.with_name(PROCESSOR_NAMES[1])
    both = other != processor_file and os.path.lexists(other)
    # Its part counts in releases of transformers that know it, the first file in all others.
    if both and read_processor(other, size, kind) not in (None, told):
        raise ArchitectureError(
            f"{config_file.parent}: {processor_file.name} and {other.name} prepare images "
            "differently, and releases of transformers take the one or the other; remove the one "
            "that is not meant"
        )
    return model_config, Preparation(told, processor_file.name)


def describe(config: Mapping[str, Any] | None) -> Config:
    """Return all values that count for a configuration, defaults of open_clip included.

    `resize_size`, which open_clip does not have, is there only if it is set: see `Resizing`.
    """
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    given = {k: v for k, v in (config or {}).items() if k in KEYS and v is not None}
    defaults: Config = {
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
        "library": "open_clip",
    }
    result = defaults | given
    if config and config.get("resize_size") is not None:
        result["resize_size"] = config["resize_size"]
    for key in ("mean", "std"):
        value = result[key]
        values = list(value) if isinstance(value, list | tuple) else [value]
        result[key] = [float(v) for v in (values * 3 if len(values) == 1 else values)]
    return result


def differs(own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two model configurations are of two architectures, as far as both tell."""
    if bool(own.get("quick_gelu")) != bool(other.get("quick_gelu")):
        return True
    for key in own.keys() & other.keys():
        first, second = own[key], other[key]
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            if any(first[k] != second[k] for k in first.keys() & second.keys()):
                return True
        elif key != "quick_gelu" and first != second:
            return True
    return False


def _is_that_file(model: str, config_file: Path) -> bool:
    """Return whether a user named the very file that lies beside the weights."""
    try:
        return Path(model).samefile(config_file)
    except OSError:
        return False


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
