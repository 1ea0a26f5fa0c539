"""Models that a Python program already holds: modules of open_clip and transformers, and others.

A module is never changed: its weights are copied into a model of pydetox. `copy_weights` writes a
repaired model's weights back into a module of the same kind.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import LayerScale, QuickGELU, VisionTransformer
from torch import Tensor, nn

from ..checkpoints import Checkpoint, resolve_model
from ..checkpoints.architecture import named_config
from ..checkpoints.preprocessing import KEYS
from ..checkpoints.transformers_clip import to_model_config, to_open_clip, to_transformers
from ..errors import ArchitectureError, UsageError
from .building import build_empty
from .encoder import EncoderModel, VisionLanguageModel, from_towers
from .identity import weights_digest
from .open_clip_model import OpenClipModel

_OPEN_CLIP = (open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa)


def from_object(given: object, *, architecture: str | None = None) -> OpenClipModel:
    """Return the model of a module, whose weights are copied.

    Args:
        given: A model of open_clip, a CLIPModel of transformers, or a `VisionLanguageModel`; also
            inside `torch.compile`, DataParallel or DistributedDataParallel.
        architecture: open_clip's name of the architecture, or a JSON file, if nothing else tells
            how to write the model to a folder. Every other use needs none.

    Raises:
        UsageError: The object is something else; the message says what to do with it.
        ArchitectureError: The object does not fit the architecture, or is a CLIPModel that
            open_clip cannot be.
    """
    module = _unwrapped(given)
    if isinstance(module, _OPEN_CLIP):
        return _of_open_clip(module, architecture)
    if _is_transformers_clip(module):
        return _of_transformers(module)
    if isinstance(module, VisionLanguageModel):
        return from_towers(module)
    if isinstance(module, nn.Module):
        raise UsageError(
            f"a {type(module).__name__} is no model of open_clip and no CLIPModel of transformers; "
            "for an image encoder or a classifier use pydetox.from_encoder(module, image_size=..., "
            "head=...), and for other towers see pydetox.VisionLanguageModel"
        )
    raise UsageError(
        f"a {type(given).__name__} is no model; expected the name of a checkpoint, a model of "
        "open_clip, a CLIPModel of transformers, or a pydetox.VisionLanguageModel"
    )


def copy_weights(model: OpenClipModel, module: nn.Module) -> None:
    """Write a model's weights into a module of the kind that the model was made from, in place.

    Values are rounded to the dtypes that the module's weights have. Raises ArchitectureError,
    before anything is changed, if the names or shapes do not fit.
    """
    module = _unwrapped(module)
    own: dict[str, Tensor] = dict(model.clip.state_dict())
    if isinstance(model, EncoderModel):
        prefix = "visual.module." if hasattr(model.visual, "_layer") else "visual."
        own = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
    elif _is_transformers_clip(module):
        own = to_transformers(own, model.model_config)
    theirs = {k: v for k, v in module.state_dict().items() if not k.endswith("position_ids")}
    wrong = [k for k in sorted(own.keys() | theirs.keys()) if _shape(own, k) != _shape(theirs, k)]
    if wrong:
        raise ArchitectureError(
            f"the weights of {model.name} do not fit a {type(module).__name__}: {wrong[0]!r} has "
            f"shape {_shape(own, wrong[0])} in the one and {_shape(theirs, wrong[0])} in the other"
        )
    with torch.no_grad():
        for key, value in theirs.items():
            value.copy_(own[key])


def _shape(state: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(state[name].shape) if name in state else None


def _unwrapped(given: Any) -> Any:
    """Return what `torch.compile` and the parallel wrappers of torch hold."""
    while isinstance(given, nn.Module):
        inner = getattr(given, "_orig_mod", None)
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        if inner is None and isinstance(given, parallel):
            inner = given.module
        if inner is None:
            break
        given = inner
    return given


def _is_transformers_clip(module: Any) -> bool:
    """Return whether an object is a CLIPModel of transformers, which need not be installed."""
    kind = type(module)
    return kind.__name__ == "CLIPModel" and kind.__module__.partition(".")[0] == "transformers"


def _of_transformers(module: Any) -> OpenClipModel:
    content = json.loads(json.dumps(module.config.to_dict(), default=str))
    name = str(content.get("_name_or_path") or type(module).__name__)
    state = {k: v.detach().cpu() for k, v in module.state_dict().items()}
    try:
        config = to_model_config(content)
        weights = to_open_clip(state, config)
    except ArchitectureError as error:
        raise ArchitectureError(f"{name}: {error}") from error
    digest = weights_digest(state)
    content["architectures"] = ["CLIPModel"]
    companions = {"config.json": f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode()}
    prepared = {"library": "transformers"}  # CLIPImageProcessor's defaults are OpenAI's values
    checkpoint = _checkpoint(weights, config, prepared, name, digest, "OpenAI's CLIP", companions)
    model = OpenClipModel.from_checkpoint(checkpoint)
    model.warnings = (
        *model.warnings,
        f"{name}: a CLIPModel does not know its processor: images are prepared as for OpenAI's "
        "CLIP; give the folder instead if its preprocessor_config.json says otherwise",
    )
    return model


def _of_open_clip(module: Any, architecture: str | None) -> OpenClipModel:
    name = type(module).__name__
    state = module.state_dict()
    digest = weights_digest(state)
    stated = getattr(module.visual, "preprocess_cfg", None) or {}
    prepared = {key: _plain(stated[key]) for key in KEYS if stated.get(key) is not None}
    source = "the object's own" if prepared else "open_clip's default"
    if architecture is not None:
        config, told = resolve_model(architecture)
        if not prepared and told:
            prepared, source = told, architecture
        named = f"{name}, named {architecture}"
        checkpoint = _checkpoint(state, config, prepared or None, named, digest, source)
        model = OpenClipModel.from_checkpoint(checkpoint)
        model.name = name
        if not _computes_the_same(model.clip, module):
            raise ArchitectureError(
                f"{name}: with its weights, {architecture} computes something else; name the "
                "architecture that it was made as (QuickGELU or not, for instance)"
            )
        return model
    for config in _configurations(module):
        checkpoint = _checkpoint(state, config, prepared or None, name, digest, source)
        try:
            model = OpenClipModel.from_checkpoint(checkpoint)
        except ArchitectureError:
            continue
        if _computes_the_same(model.clip, module):
            return model
    twin = copy.deepcopy(module).float()
    if isinstance(twin, open_clip.CoCa):
        twin.visual.output_tokens = False  # as in every other model here
    size = module.visual.image_size
    text = {"context_length": int(module.context_length), "vocab_size": _vocabulary(module)}
    model = OpenClipModel(
        twin,
        model_config={
            "embed_dim": _embed_dim(module),
            "vision_cfg": {"image_size": size[0] if isinstance(size, tuple | list) else size},
            "text_cfg": text,
        },
        preprocess_config=prepared or None,
        name=name,
        storage_dtypes={key: value.dtype for key, value in state.items()},
        sha256=digest,
        preprocess_source=source,
    )
    model.layout_obstacle = (
        "no configuration of open_clip is known to build it: name its architecture with "
        "architecture=, or leave output= out and take the weights with pydetox.copy_weights"
    )
    return model


def _checkpoint(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    prepared: Mapping[str, Any] | None,
    name: str,
    digest: str,
    source: str,
    companions: dict[str, bytes] | None = None,
) -> Checkpoint:
    return Checkpoint(
        {key: value.detach().cpu() for key, value in state.items()},
        dict(config),
        None if prepared is None else dict(prepared),
        name,
        Path(name),
        digest,
        "object",
        companions=companions or {},
        preprocess_source=source,
    )


def _configurations(module: Any) -> Iterator[dict[str, Any]]:
    """Yield configurations that may have built a module: its own, and open_clip's of its shape."""
    if type(module) is open_clip.CLIP and type(module.visual) is VisionTransformer:
        yield _own_configuration(module)
    size = module.visual.image_size
    side = size[0] if isinstance(size, tuple | list) else size
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for name in open_clip.list_models():
        config = named_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        fits = (
            vision.get("image_size", 224) == side
            and config["embed_dim"] == _embed_dim(module)
            and text.get("vocab_size", 49408) == _vocabulary(module)
            and text.get("context_length", 77) == module.context_length
            and bool(config.get("custom_text")) == (type(module) is not open_clip.CLIP)
        )
        if not fits:
            continue
        try:
            empty = build_empty(config, name)
        except ArchitectureError:
            continue
        if {key: tuple(value.shape) for key, value in empty.state_dict().items()} == shapes:
            yield config


def _own_configuration(module: Any) -> dict[str, Any]:
    """Return the configuration that a plain CLIP with a vision transformer shows in itself."""
    tower, blocks = module.visual, module.visual.transformer.resblocks
    width = tower.conv1.out_channels
    vision: dict[str, Any] = {
        "image_size": tower.image_size[0],
        "patch_size": tower.patch_size[0],
        "width": width,
        "layers": len(blocks),
        "head_width": width // blocks[0].attn.num_heads if len(blocks) else 64,
        "mlp_ratio": blocks[0].mlp.c_fc.out_features / width if len(blocks) else 4.0,
    }
    if isinstance(tower.ln_pre, nn.Identity):
        vision["no_ln_pre"] = True
    if tower.pool_type != "tok":
        vision["pool_type"] = tower.pool_type
    if tower.final_ln_after_pool:
        vision["final_ln_after_pool"] = True
    if len(blocks) and isinstance(blocks[0].ls_1, LayerScale):
        vision["ls_init_value"] = 1e-5  # what the weights replace
    texts = module.transformer.resblocks
    text = {
        "context_length": int(module.context_length),
        "vocab_size": _vocabulary(module),
        "width": module.token_embedding.embedding_dim,
        "heads": texts[0].attn.num_heads if len(texts) else 1,
        "layers": len(texts),
    }
    config = {"embed_dim": _embed_dim(module), "vision_cfg": vision, "text_cfg": text}
    if any(isinstance(part, QuickGELU) for part in module.modules()):
        config["quick_gelu"] = True
    return config


def _embed_dim(module: Any) -> int:
    projection = getattr(module, "text_projection", None)
    if projection is None:
        projection = getattr(getattr(module, "text", None), "text_projection", None)
    if isinstance(projection, nn.Linear):
        return int(projection.out_features)
    if isinstance(projection, Tensor):
        return int(projection.shape[1])
    return int(getattr(module.visual, "output_dim", 0) or 0)


def _vocabulary(module: Any) -> int:
    for part in (module, getattr(module, "text", None)):
        table = getattr(part, "token_embedding", None)
        if isinstance(table, nn.Embedding):
            return int(table.num_embeddings)
    return int(getattr(module, "vocab_size", 0) or getattr(module.text, "vocab_size", 0) or 0)


@torch.no_grad()
def _computes_the_same(ours: Any, theirs: Any) -> bool:
    """Return whether two modules with equal weights give a picture and a text one embedding."""
    size = theirs.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    weight = next(theirs.parameters())
    ramp = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
    tokens = torch.zeros(1, int(theirs.context_length), dtype=torch.int64)
    last = _vocabulary(theirs) - 1
    tokens[0, : min(4, tokens.shape[1])] = torch.tensor([last - 1, 5, 7, last])[: tokens.shape[1]]
    was_training = theirs.training
    theirs.eval()
    try:
        for inputs, method in ((ramp, "encode_image"), (tokens, "encode_text")):
            given = inputs.to(weight.device)
            given = given.to(weight.dtype) if inputs.is_floating_point() else given
            expected = getattr(theirs, method)(given).float().cpu()
            found = getattr(ours, method)(inputs).float()
            limit = 1e-5 if weight.dtype == torch.float32 else 1e-3  # what rounding may change
            if not 1 - torch.cosine_similarity(expected, found).item() < limit:
                return False
    finally:
        theirs.train(was_training)
    return True


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
