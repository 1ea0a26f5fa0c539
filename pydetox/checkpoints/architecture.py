"""The architecture that weights belong to, and checks that they fit it.

A model configuration is open_clip's ``model_cfg``: a dictionary with ``embed_dim``, ``vision_cfg``
and ``text_cfg``. It may come from a stranger together with the weights, so it is checked before
anything is built from it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from pydetox.checkpoints.classifier_names import (
    classifier_config,
    is_classifier_name,
    named_classifiers,
)
from pydetox.checkpoints.index import Finding, Findings, WeightsFile, quote
from pydetox.checkpoints.layout import CONFIG_NAME
from pydetox.checkpoints.naming import plain_name
from pydetox.checkpoints.spelling import close_matches
from pydetox.data.resize import INTERPOLATIONS, LIBRARIES, MAX_SIDE, RESIZE_MODES
from pydetox.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError, UsageError

__all__ = [
    "CONFIG_NAME",
    "Config",
    "check_finite",
    "check_model_config",
    "check_preprocess_config",
    "close_matches",
    "describe_mismatch",
    "named_config",
    "nonfinite_findings",
    "read_config",
    "resolve_model",
]

Config = dict[str, Any]

_MAX_CONFIG_BYTES = 1 << 20
# No size in a real configuration is larger (vocabularies reach 250,000); larger ones only exhaust
# memory.
_MAX_NUMBER = 10_000_000
_MAX_LAYERS = 1_000


def read_config(path: str | os.PathLike[str]) -> tuple[Config, Config | None]:
    """Read model and preprocessing configuration from a JSON file.

    Args:
        path: open_clip's ``open_clip_config.json`` (``model_cfg`` and, optionally,
            ``preprocess_cfg``) or a bare model configuration.

    Raises:
        ArchitectureError: The file is no such configuration.
        UnsafeCheckpointError: It asks for remote code or absurd sizes.
    """
    try:
        with WeightsFile(path) as file:
            if file.size > _MAX_CONFIG_BYTES:
                raise ArchitectureError(
                    f"has {file.size} bytes, a model configuration has at most {_MAX_CONFIG_BYTES}"
                )
            raw = file.read_at(0, file.size, "the configuration")
        try:
            content = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ArchitectureError(f"is not a JSON file ({error})") from None
        if not isinstance(content, dict):
            raise ArchitectureError("is not a JSON object")
        model_config = content.get("model_cfg", content)
        preprocess_config = content.get("preprocess_cfg") if "model_cfg" in content else None
        check_model_config(model_config)
        check_preprocess_config(preprocess_config)
        if preprocess_config is not None:
            preprocess_config.pop("library", None)  # open_clip's transform is meant
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error
    return model_config, preprocess_config


def named_config(name: str) -> Config:
    """Return open_clip's built-in configuration of an architecture such as ``ViT-B-32``.

    Raises:
        UsageError: There is none of that name. The message names the closest ones.
    """
    import open_clip

    if name in open_clip.list_models():
        return copy.deepcopy(dict(open_clip.get_model_config(name)))
    _refuse_without_library(name)
    raise UsageError(
        f"architecture {quote(name)}: not known to "
        f"open_clip{close_matches(name, open_clip.list_models())}"
    )


def resolve_model(model: str | os.PathLike[str]) -> tuple[Config, Config | None]:
    """Return the configuration that the argument ``model=`` names.

    The argument is open_clip's name of an architecture, the name of a classifier
    (`classifier_names`), or the path of a JSON file. It is a path if it ends in ``.json`` or
    contains a slash.

    Raises:
        UsageError: It is neither.
        ArchitectureError: The JSON file is no model configuration.
    """
    text = os.fspath(model)
    if text.startswith(("hf-hub:", "local-dir:", "http://", "https://")):
        raise UsageError(
            f"architecture {quote(text)}: expected open_clip's name of one, that of a classifier, "
            "or a JSON file; a repository of the hub and a folder are checkpoints, and tell their "
            "own"
        )
    if is_classifier_name(text):
        return classifier_config(text)
    if not text.endswith(".json") and os.sep in text and not os.path.lexists(text):
        _refuse_name_with_slash(text)
    if text.endswith(".json") or os.sep in text:
        return read_config(Path(text).expanduser())
    return named_config(text), None


def _refuse_without_library(name: str) -> None:
    """Raise UsageError, with what is meant, for the name of a classifier without its library."""
    found = named_classifiers(name)
    if found:
        raise UsageError(
            f"architecture {quote(name)}: not known to open_clip; as a classifier, it is written "
            f"{' or '.join(found)}"
        )


def _refuse_name_with_slash(text: str) -> None:
    """Raise UsageError, with what is meant, for a name of OpenAI's or of the hub."""
    import open_clip

    plain = plain_name(text)
    _refuse_without_library(text)
    if plain in open_clip.list_models():
        quick = f"{plain}-quickgelu"
        more = f" ({quick} for OpenAI's weights)" if quick in open_clip.list_models() else ""
        raise UsageError(f"architecture {quote(text)}: open_clip calls it {plain}{more}")
    if text.count("/") == 1:
        raise UsageError(
            f"architecture {quote(text)}: is none of open_clip's and no file; a repository of the "
            f"hub is a checkpoint, hf-hub:{text}, and tells its own"
        )


def check_model_config(config: object) -> None:
    """Refuse a dictionary that is no model configuration, or a dangerous one.

    Raises:
        ArchitectureError: A part is missing or of the wrong type, or a size is absurd.
        UnsafeCheckpointError: It asks for code or weights from elsewhere (``trust_remote_code``,
            ``hf-hub:`` names).
    """
    if not isinstance(config, dict):
        raise ArchitectureError("its model configuration is not a JSON object")
    embed_dim = config.get("embed_dim")
    if type(embed_dim) is not int or embed_dim < 1:
        raise ArchitectureError("its model configuration has no positive integer 'embed_dim'")
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(config.get(part), dict):
            raise ArchitectureError(f"its model configuration has no dictionary {part!r}")
    for key, value in _walk(config):
        if key == "trust_remote_code" and value:
            raise UnsafeCheckpointError("its model configuration asks for trust_remote_code")
        if isinstance(value, str) and key.endswith("name") and ":" in value:
            raise UnsafeCheckpointError(
                f"its model configuration takes {quote(key)} from {quote(value)}, which would be "
                "downloaded"
            )
        if isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:
            raise ArchitectureError(
                f"its model configuration has {quote(key)} beyond {_MAX_NUMBER}"
            )
        if "layers" in key and isinstance(value, int) and value > _MAX_LAYERS:
            raise ArchitectureError(
                f"its model configuration has {quote(key)} = {value}, at most {_MAX_LAYERS} are "
                "accepted"
            )


def check_preprocess_config(config: object) -> None:
    """Refuse a preprocessing configuration that cannot be used.

    Raises:
        ArchitectureError: It is neither ``None`` nor a dictionary, ``mean`` or ``std`` is not
            three finite numbers (``std`` positive), or ``interpolation``, ``resize_mode``,
            ``resize_size``, ``fill_color`` or ``library`` is none that images can be prepared with.
    """
    if config is None:
        return
    if not isinstance(config, dict):
        raise ArchitectureError("its preprocess_cfg is not a JSON object")
    for key, known in (
        ("interpolation", INTERPOLATIONS),
        ("resize_mode", RESIZE_MODES),
        ("library", LIBRARIES),
    ):
        if config.get(key) is not None and config[key] not in known:
            raise ArchitectureError(
                f"its preprocess_cfg has {key} = {quote(config[key])}, expected one of "
                + ", ".join(known)
            )
    fill = config.get("fill_color")
    if fill is not None and (type(fill) is not int or not 0 <= fill <= 255):
        raise ArchitectureError(
            f"its preprocess_cfg has fill_color = {quote(fill)}, expected a number in 0..255"
        )
    size = config.get("resize_size")
    if size is not None and (type(size) is not int or not 1 <= size <= MAX_SIDE):
        raise ArchitectureError(
            f"its preprocess_cfg has resize_size = {quote(size)}, expected a number of pixels in "
            f"1..{MAX_SIDE}"
        )
    for key in ("mean", "std"):
        values = config.get(key)
        if values is None:
            continue
        if isinstance(values, (int, float)) and not isinstance(values, bool):
            values = [values]  # open_clip accepts one number for all channels
        numbers = (
            isinstance(values, (list, tuple))
            and len(values) in (1, 3)
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
            and all(abs(v) <= _MAX_NUMBER and (key == "mean" or v > 0) for v in values)
        )
        if not numbers:
            raise ArchitectureError(
                f"its preprocess_cfg has {key} = {quote(values)}, expected three finite"
                f"{' positive' if key == 'std' else ''} numbers"
            )


def check_finite(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raise if any weight is NaN or infinite.

    Raises:
        ArchitectureError: Names the first such tensor, how many of its elements are affected, and
            how many tensors.
    """
    bad = [name for name, tensor in state_dict.items() if not _is_finite(tensor)]
    if bad:
        first = state_dict[bad[0]]
        count = int((~torch.isfinite(_comparable(first))).sum())
        raise ArchitectureError(
            f"tensor {quote(bad[0])}: {count} of its {first.numel()} weights are NaN or infinite "
            f"({len(bad)} of {len(state_dict)} tensors are affected)"
        )


def nonfinite_findings(state_dict: Mapping[str, torch.Tensor]) -> tuple[Finding, ...]:
    """A finding for each tensor that is NaN or infinite in places."""
    findings = Findings()
    for name, tensor in state_dict.items():
        if not _is_finite(tensor):
            count = int((~torch.isfinite(_comparable(tensor))).sum())
            findings.add(
                "non-finite",
                f"tensor {quote(name)}: {count} of its {tensor.numel()} weights are NaN or "
                "infinite",
            )
    return findings.result()


def describe_mismatch(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> str | None:
    """One line saying how the tensors of a checkpoint differ from those of a model.

    Args:
        expected: Name to shape, of the model.
        found: Name to shape, of the checkpoint.

    Returns:
        ``None`` if names and shapes agree. Otherwise up to three names each of the missing, the
        unexpected and the misshapen tensors, with their counts.
    """
    missing = [quote(name) for name in expected if name not in found]
    extra = [quote(name) for name in found if name not in expected]
    misshapen = [
        f"{quote(name)} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", misshapen))
    parts = [f"{len(items)} {kind} ({_first_three(items)})" for kind, items in kinds if items]
    if not parts:
        return None
    return f"the weights do not fit the architecture ({len(expected)} tensors): {'; '.join(parts)}"


def _first_three(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    # The 8-bit floats have no comparison of their own.
    return tensor.float() if tensor.element_size() == 1 else tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # Minimum and maximum pass NaN on, and need no mask as large as the tensor.
    low, high = torch.aminmax(_comparable(tensor))
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _walk(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield all (key, value) pairs, also nested ones; list elements come under the list's key."""
    pending: list[tuple[str, object]] = list(config.items())
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, (list, tuple)):
            pending.extend((key, item) for item in value)


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
