"""From checked files to a module of transformers.

The module is built twice: without memory first, to compare its tensors with those of the file, so
that a configuration that does not fit costs nothing; then with memory, as much as the file has.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoints.index import quote
from ..errors import ArchitectureError, CheckpointError
from .extra import import_extra
from .files import TextFiles

#: Buffers that older versions of transformers saved, and that newer ones compute.
_COMPUTED = re.compile(
    r"(^|\.)(position_ids|attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)$"
)

#: Names of parameters that older versions of transformers wrote.
_OLD_NAMES = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)

#: The towers that are built by their class.
_TOWERS = ("CLIPTextModelWithProjection", "CLIPTextModel")


@dataclass(frozen=True)
class Stored:
    """What a tensor of a file is in the module.

    Attributes:
        parameter: Its name in the module.
        dtype: Its dtype in the file.
    """

    parameter: str
    dtype: torch.dtype


def stored_tensors(files: TextFiles) -> dict[str, Stored]:
    """Return what each tensor of a file is in the module that its configuration describes.

    Raises ArchitectureError, naming tensors, unless file and module have the same tensors of the
    same shapes. Buffers that transformers computes are left out.
    """
    with torch.device("meta"):
        module = _from_config(files, torch.float32)
    state = module.state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    floats = {name for name, value in state.items() if value.is_floating_point()}
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    found = dict[str, Stored]()
    unexpected = list[str]()
    loaded_as = _module_names(module, files)
    for name, tensor in files.state_dict.items():
        parameter = _parameter(loaded_as[name], expected, prefix)
        if parameter is None:
            if not _COMPUTED.search(name):
                unexpected.append(name)
            continue
        if tuple(tensor.shape) != expected[parameter]:
            raise ArchitectureError(
                f"{files.path}: tensor {quote(name)} is {list(tensor.shape)}; its config.json "
                f"describes {list(expected[parameter])}"
            )
        if not tensor.is_floating_point() and parameter in floats:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ArchitectureError(
                f"{files.path}: tensor {quote(name)} is {kind}; expected numbers of floating point "
                "(if the weights are quantised, dequantise the model and save it)"
            )
        if any(parameter == one.parameter for one in found.values()):
            raise ArchitectureError(f"{files.path}: two tensors are {quote(parameter)}")
        found[name] = Stored(parameter, tensor.dtype)
    present = {one.parameter for one in found.values()}
    tied = _tied(module)
    missing = [
        name
        for name in expected
        if name not in present and not any(name in group and group & present for group in tied)
    ]
    for verb, names in (("lacks", missing), ("has no place for", unexpected)):
        if names:
            shown = ", ".join(map(quote, names[:5])) + (", …" if len(names) > 5 else "")
            where = "the file" if names is missing else f"a {type(module).__name__}"
            both = missing and unexpected
            told = f"; it has {quote(unexpected[0])}, which is another name" if both else ""
            raise ArchitectureError(
                f"{files.path}: {where} {verb} {len(names)} tensors ({shown}){told}"
            )
    return found


def build_module(files: TextFiles, stored: Mapping[str, Stored], dtype: torch.dtype) -> nn.Module:
    """Return the module with the weights of a file, frozen and in eval mode.

    Raises ArchitectureError if tied weights differ.
    """
    with _without_drawing():
        module = _from_config(files, dtype)
    module.tie_weights()  # type: ignore[operator]
    by_parameter = {one.parameter: files.state_dict[name] for name, one in stored.items()}
    for group in _tied(module):
        given = [name for name in sorted(group) if name in by_parameter]
        for other in given[1:]:
            if not torch.equal(by_parameter[given[0]], by_parameter[other]):
                raise ArchitectureError(
                    f"{files.path}: {quote(given[0])} and {quote(other)} differ, and its "
                    "config.json says that they are one (tie_word_embeddings)"
                )
    module.load_state_dict(by_parameter, strict=False)
    module.requires_grad_(False)
    return module.eval()


def _module_names(module: nn.Module, files: TextFiles) -> dict[str, str]:
    """Return the name that transformers loads each tensor of a file under, without base prefix.

    Modules of transformers 5 name some tensors otherwise than its files, as GPT-NeoX's output.
    Raises ArchitectureError for a tensor that transformers computes anew from those of the file.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4 names tensors as its files do
        return {name: name for name in files.state_dict}
    names = dict[str, str]()
    changes = get_model_conversion_mapping(module)
    for name in sorted(files.state_dict):  # the order that groups of renamings expect
        new = name
        for change in changes:
            if isinstance(change, WeightRenaming):
                new, _ = change.rename_source_key(new)
        for change in changes:
            if not isinstance(change, WeightRenaming) and change.rename_source_key(new)[1]:
                raise ArchitectureError(
                    f"{files.path}: transformers computes a tensor of a {type(module).__name__} "
                    f"from {quote(name)} (as stacked experts), and pydetox does not; expected an "
                    "architecture whose tensors are loaded as they are"
                )
        names[name] = new
    return names


def _parameter(name: str, expected: Mapping[str, Any], prefix: str) -> str | None:
    """Return the module's name for a tensor; None if it has none."""
    for pattern, new in _OLD_NAMES:
        name = pattern.sub(new, name)
    candidates = (name, f"{prefix}{name}", name.removeprefix(prefix))
    return next((one for one in candidates if one in expected), None)


def _tied(module: nn.Module) -> list[set[str]]:
    """Return the groups of names that are one tensor."""
    groups: list[set[str]] = []
    pairs: Iterable[tuple[str, str]] = ()
    mapping = getattr(module, "all_tied_weights_keys", None)
    if isinstance(mapping, dict):
        pairs = mapping.items()
    for target, source in pairs:
        known = next((group for group in groups if target in group or source in group), None)
        if known is None:
            groups.append({target, source})
        else:
            known |= {target, source}
    return groups


def _from_config(files: TextFiles, dtype: torch.dtype) -> nn.Module:
    transformers = import_extra("transformers", files.name)
    model_type = files.config["model_type"]
    architecture = files.config["architectures"][0]
    try:
        if model_type not in transformers.CONFIG_MAPPING:
            raise ArchitectureError(
                f"model_type = {quote(model_type)} is none that transformers "
                f"{transformers.__version__} knows"
            )
        config = transformers.CONFIG_MAPPING[model_type].from_dict(dict(files.config))
        if files.kind == "tower":
            if architecture not in _TOWERS:
                raise ArchitectureError(f"{architecture} is no text tower that pydetox builds")
            made: nn.Module = getattr(transformers, architecture)._from_config(config, dtype=dtype)
        elif files.kind == "classifier":
            made = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        else:
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except CheckpointError as error:
        raise type(error)(f"{files.path.parent}: {error}") from error
    except Exception as error:  # transformers raises whatever a configuration led it into
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArchitectureError(
            f"{files.path.parent}: transformers builds no model from its config.json: {reason}"
        ) from error
    if type(made).__name__ != architecture:
        raise ArchitectureError(
            f"{files.path.parent}: its config.json names the architecture {quote(architecture)}, "
            f"and transformers builds {type(made).__name__} for model_type {quote(model_type)}"
        )
    heads = [name for name in ("classifier", "score") if hasattr(made, name)]
    if files.kind == "classifier" and not heads:
        raise ArchitectureError(
            f"{files.path.parent}: {architecture} has no head that pydetox knows; expected one "
            "with a classifier (as BERT's) or a score (as GPT-2's)"
        )
    return made


@contextlib.contextmanager
def _without_drawing() -> Iterator[None]:
    """Build without initial weights; the caller's random numbers stay as they are."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    with torch.random.fork_rng(devices=[]), no_init_weights():
        yield
