"""The architectures that open_clip knows, and which of them are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.architecture import named_config
from ..checkpoints.preprocessing import describe, preparation_of
from .hub_towers import tower_obstacle


@dataclass(frozen=True)
class ListedModel:
    """One of open_clip's architectures.

    Attributes:
        name: open_clip's name of it.
        image_size: The height and width of its images, in pixels.
        preprocessing: The preparation of images that open_clip's pretrained tags name.
        guessed: The values of `preprocessing` that are a guess, because tags differ or there are
            none.
        tags: Its pretrained tags.
        tokenizer: The tokenizer of the hub that its texts need; None for CLIP's own.
        obstacle: The reason why pydetox does not read it; None if pydetox does.
    """

    name: str
    image_size: int
    preprocessing: Mapping[str, Any]
    guessed: tuple[str, ...]
    tags: tuple[str, ...]
    tokenizer: str | None
    obstacle: str | None


def building_obstacle(config: Mapping[str, Any]) -> str | None:
    """Return why a model of that ``model_cfg`` is not built, or None if it is."""
    tower = config.get("text_cfg", {}).get("hf_model_name")
    return tower_obstacle(str(tower)) if tower else None


def listed_models() -> tuple[ListedModel, ...]:
    """Return all of open_clip's architectures, in its order."""
    from open_clip import list_models, list_pretrained_tags_by_model

    found = []
    for name in list_models():
        config = named_config(name)
        prepared = preparation_of(name)
        found.append(
            ListedModel(
                name=name,
                image_size=int(config["vision_cfg"].get("image_size", 224)),
                preprocessing=describe(prepared.config),
                guessed=prepared.guessed,
                tags=tuple(list_pretrained_tags_by_model(name)),
                tokenizer=config["text_cfg"].get("hf_tokenizer_name"),
                obstacle=building_obstacle(config),
            )
        )
    return tuple(found)
