"""The step from the names and shapes in people's checkpoints to those of open_clip's module.

It does what open_clip itself does when it loads a file (`load_checkpoint` in its factory.py). It
also removes wrappers around the names, which loses nothing. Whatever changes or leaves out a weight
is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from torch import Tensor, nn

from pydetox.checkpoints.index import quote
from pydetox.errors import ArchitectureError

# Attributes under which training code keeps a CLIP: Lightning, torch.compile, wise-ft, and others.
_WRAPPERS = re.compile(r"((?:module|_orig_mod|model|clip_model|clip|image_encoder)\.)+")
# Of old versions: masks and counts, which are computed and not learned.
_COMPUTED = re.compile(r"(?:.*\.)?(?:attn_mask|position_ids)")
_HINTS = (
    (
        "_mask",
        "it was pruned and not made permanent: call torch.nn.utils.prune.remove for each parameter "
        "and save it again",
    ),
    ("logit_bias", 'its configuration lacks "init_logit_bias": -10, as models of SigLIP have'),
    (
        "_fsdp_wrapped_module.",
        "its names are those inside FSDP: save the full state dictionary (FullStateDictConfig), or "
        "remove '_fsdp_wrapped_module.' from all names",
    ),
    (
        "_checkpoint_wrapped_module.",
        "its names are those inside a wrapper that saves memory: remove "
        "'_checkpoint_wrapped_module.' from all names",
    ),
    (
        "parametrizations.",
        "it holds parts of weights, such as those of weight_norm: call "
        "torch.nn.utils.parametrize.remove_parametrizations for each and save it again",
    ),
    (
        "weight_g",
        "it holds parts of weights: call torch.nn.utils.remove_weight_norm for each module and "
        "save it again",
    ),
    ("text.", 'its configuration lacks "custom_text": true'),
)
#: Those that may stand in the middle of a name.
_INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "parametrizations.")


def adapt(
    weights: Mapping[str, Tensor], module: nn.Module
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights under the names of a module, in its shapes, and a line for each real change.

    weights: The tensors by name. A tensor that does not fit stays as it is. module: open_clip's.
    Raises ArchitectureError where two tensors would get one name, or where a second model is left.
    """
    expected = module.state_dict()
    notes: list[str] = []
    result = _unwrapped(dict(weights), expected, notes)
    if "positional_embedding" in result and "positional_embedding" not in expected:
        _refuse_twins(result)
        result = convert_to_custom_text_state_dict(result)
    elif any(name.startswith("text.") for name in result) and not any(
        name.startswith("text.") for name in expected
    ):
        _refuse_twins(result)
        result = {name.removeprefix("text."): value for name, value in result.items()}
    result = {n: v for n, v in result.items() if n in expected or not _COMPUTED.fullmatch(n)}
    for name in ("logit_scale", "logit_bias"):
        if name in result and name in expected and result[name].numel() == 1:
            result[name] = result[name].reshape(expected[name].shape)
    if "logit_bias" in expected and "logit_bias" not in result and "logit_scale" in result:
        result["logit_bias"] = torch.zeros_like(result["logit_scale"])
    return _resized(result, module, expected, notes), tuple(notes)


def without_texts(
    weights: Mapping[str, Tensor], module: nn.Module
) -> tuple[dict[str, Tensor], str] | None:
    """Return the image tower's weights and a line about it, if there is no text tower; or None.

    Image towers alone come with open_clip's names, `visual.` and more (DECREE's encoders), without
    that prefix, or beside what is left of a text tower whose transformer was deleted (wise-ft and
    task_vectors). weights: As `adapt` returns them.
    """
    expected = module.state_dict()
    tower = [name for name in expected if name.startswith("visual.")]
    if not tower or len(tower) == len(expected):
        return None
    bare = {f"visual.{name}": value for name, value in weights.items()}
    if set(tower) <= bare.keys() and not set(tower) <= weights.keys():
        extra = [name for name in bare if name not in expected]
        if extra:
            return None
        return bare, "its names are those of an image tower alone, without texts"
    texts = [n for n in expected if n.startswith(("transformer.", "text.", "text_decoder."))]
    if not set(tower) <= weights.keys() or any(name in weights for name in texts):
        return None
    rest = [n for n in weights if not n.startswith("visual.")]
    if any(name not in expected for name in rest):
        return None
    left = f"; {len(rest)} tensors beside it are left out ({', '.join(rest[:3])})" if rest else ""
    kept = {name: weights[name] for name in tower}
    return kept, f"it is an image tower alone, without texts{left}"


def hint(names: Mapping[str, object], expected: Mapping[str, object]) -> str:
    """Return advice about names that a module does not have, or an empty text."""
    extra = [name for name in names if name not in expected]
    for part, words in _HINTS:
        inside = part in _INSIDE and any(f".{part}" in name for name in extra)
        if inside or any(name.endswith(part) or name.startswith(part) for name in extra):
            return f"; {words}"
    return _hint_about_beginnings(names, expected)


def _hint_about_beginnings(names: Mapping[str, object], expected: Mapping[str, object]) -> str:
    """Return advice about names of the model behind something else, or an empty text."""
    longest = max(expected, key=len)
    ends = [name for name in names if name == longest or name.endswith(f".{longest}")]
    begin = [name.removesuffix(longest) for name in ends]
    if not any(begin):
        return ""
    shown = ", ".join(quote(one) for one in begin if one)
    if len(begin) == 1:
        return f"; its names begin with {shown}: write the weights again under names without it"
    more = "another model as well" if "" in begin else f"{len(begin)} models"
    return (
        f"; it holds {more} (names that begin with {shown}): write the weights that are meant to a "
        "file of their own, under names without that beginning"
    )


def _refuse_twins(weights: Mapping[str, Tensor]) -> None:
    """Raise ArchitectureError for two tensors that the names of one text tower mean."""
    twin = next((name for name in weights if f"text.{name}" in weights), None)
    if twin is not None:
        raise ArchitectureError(
            f"holds tensors {quote(twin)} and {quote(f'text.{twin}')}, which loaders take for one; "
            "write the weights that are meant to a file of their own"
        )


def _unwrapped(
    weights: dict[str, Tensor], expected: Mapping[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Remove the prefix of all names of the model; leave out the names without it."""
    if any(name in expected for name in weights if name != "logit_scale"):
        return weights
    found = (_WRAPPERS.match(name) for name in weights if ".visual." in name)
    prefixes = {match[0] for match in found if match is not None}
    if not prefixes:
        return weights
    prefix, *more = sorted(prefixes)
    inside = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    outside = [name for name in weights if not name.startswith(prefix)]
    rival = next((n for n in outside if _WRAPPERS.match(n) or ".visual." in f".{n}"), None)
    rival = more[0] if more else rival
    if rival is not None:
        raise ArchitectureError(
            f"holds two models: tensors that begin with {quote(prefix)}, and others such as "
            f"{quote(rival)}; write the weights that are meant to a file of their own"
        )
    if outside:
        shown = ", ".join(outside[:3]) + (", …" if len(outside) > 3 else "")
        notes.append(f"{len(outside)} tensors beside the model are left out ({shown})")
    return inside


def _resized(
    weights: dict[str, Tensor],
    module: nn.Module,
    expected: Mapping[str, Tensor],
    notes: list[str],
) -> dict[str, Tensor]:
    """Resize the image tower's position embedding as open_clip does when it loads a file."""
    name = "visual.positional_embedding"
    given, wanted = weights.get(name), expected.get(name)
    if given is None or wanted is None or given.shape == wanted.shape:
        return weights
    tokens = given.shape[0] - 1 if given.ndim == 2 else 0
    if given.shape[1:] != wanted.shape[1:] or tokens < 1 or round(tokens**0.5) ** 2 != tokens:
        return weights
    holder = {name: given.float()}
    resize_pos_embed(holder, module)
    notes.append(
        f"its position embedding has {given.shape[0]} tokens and the architecture "
        f"{wanted.shape[0]}: it is resized, as open_clip does"
    )
    return {**weights, name: holder[name].to(given.dtype)}
