"""From a ``model_cfg`` to a module: open_clip's own classes, and those of `towers`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoints import check_model_config
from ..errors import ArchitectureError
from .catalogue import building_obstacle
from .classifiers import build_classifier
from .hub_towers import built_here, is_missing
from .towers import build_towers


class NoRandomNumbers(TorchFunctionMode):
    """Leave random initialisations out, in this thread alone; the tensors stay uninitialised.

    Weights that are read from a file need no initial values. Drawing these takes longer than
    reading the file. The system also allocates no memory that is never written to.
    """

    _FILLS = frozenset(
        {
            Tensor.uniform_,
            Tensor.erfinv_,  # timm makes truncated normal numbers of uniform ones with it
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.kaiming_normal_,
            nn.init.kaiming_uniform_,
        }
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in self._FILLS:
            return args[0] if args else given["tensor"]
        if func is Tensor.normal_:  # torch draws truncated ones again until all are within bounds
            return args[0].fill_(args[1] if len(args) > 1 else given.get("mean", 0.0))
        if func is torch.randn:
            func = torch.empty
        return func(*args, **given)


def build(model_config: Mapping[str, Any], seed: int | None, name: str) -> nn.Module:
    """Return the module of a ``model_cfg``, open_clip's where it builds that itself.

    seed: The seed of its weights; None leaves them uninitialised. torch's global generator does not
    change. name: The model's name in messages.

    Raises:
        ArchitectureError: It cannot be built.
        UnsafeCheckpointError: It asks for code or weights from elsewhere.
    """
    check_model_config(model_config)
    config = copy.deepcopy(dict(model_config))
    obstacle = None if "layout" in config else building_obstacle(config)
    if obstacle is not None:
        raise ArchitectureError(f"{name}: {obstacle}")
    tower = config.get("text_cfg", {}).get("hf_model_name")
    if tower and is_missing():
        raise ArchitectureError(
            f"{name}: its text tower is {tower!r} of transformers: pip install transformers (an "
            "image tower alone, with the text tower left out of its file, needs none)"
        )
    custom = config.pop("custom_text", False) or bool(tower)
    architecture = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "multimodal_cfg" in config:
        architecture = open_clip.CoCa
    try:
        random = NoRandomNumbers() if seed is None else nullcontext()
        with torch.random.fork_rng(devices=[]), random:
            torch.manual_seed(seed or 0)
            if config.get("layout") == "classifier":
                return build_classifier(config)
            if "layout" in config:
                return build_towers(config)
            with built_here(config) as plain:
                clip: nn.Module = architecture(**plain)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArchitectureError(f"{name}: its architecture cannot be built: {reason}") from error
    if isinstance(clip, open_clip.CoCa):
        # Its image tower gives a captioner tokens beside the embedding, and nobody captions here.
        clip.visual.output_tokens = False
    return clip


def build_empty(model_config: Mapping[str, Any], name: str) -> nn.Module:
    """Return the module without memory for its weights, on the meta device; raises as `build`."""
    with torch.device("meta"):
        return build(model_config, None, name)
