"""A CLIP model of open_clip, built from a checkpoint that was read safely."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..checkpoints import Checkpoint, describe_mismatch
from ..checkpoints.identity import tokenizer_digests
from ..checkpoints.loading import require_unambiguous
from ..checkpoints.preprocessing import describe
from ..data import Resizing, Template, fill_templates
from ..data.names import given_names, given_templates
from ..errors import ArchitectureError, DataError
from ..ops.reference import to_patch_rows
from .activation import OPENAI_ENTRIES, require_right_activation
from .adaptation import adapt, hint, without_texts
from .building import build
from .classifiers import Classifier, with_classes
from .frozen import FrozenTower, freeze, trainable
from .memory import Batching
from .tokenizers import Tokenizer, tokenize, tokenizer_of
from .towers import Towers

# Prompts that go through a text tower at once, on a CPU and on a GPU. They are halved if memory
# runs out.
# In most models a hundred prompts are some hundred MiB of activations.
_PROMPTS_ON_CPU, _PROMPTS_ON_GPU = 128, 2048

# The dtypes of weights. 8-bit floats and integers need scales, which no state dict of CLIP has.
_PLAIN_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class HeadMemo:
    """A memory of zero-shot heads, by text tower, class names and templates.

    Models that share it and have the same text tower share their heads. It keeps the last few.
    """

    _LIMIT = 8

    def __init__(self) -> None:
        self._heads: dict[object, Tensor] = {}

    def get(self, key: object, compute: Callable[[], Tensor]) -> Tensor:
        """Return the head of a key; compute it if it is missing."""
        if key not in self._heads:
            while len(self._heads) >= self._LIMIT:
                del self._heads[next(iter(self._heads))]
            self._heads[key] = compute()
        return self._heads[key]


class OpenClipModel:
    """Both towers in evaluation mode, float32, with no parameter requiring a gradient.

    Attributes:
        clip: open_clip's module (`CLIP`, `CustomTextCLIP` or `CoCa`), a `Towers` or a `Classifier`.
        name: The name of the model's source, for messages and reports.
        sha256: The hash of the weights file, or of the weights of an object that the model was made
            from. None for a model with random weights, and for a copy, whose weights may change.
        warnings: One line for each part of the checkpoint that was guessed, changed or left out.
        named: The architecture that the user named, where the checkpoint does not tell; else None.
        model_config: open_clip's ``model_cfg``.
        preprocess_config: open_clip's ``preprocess_cfg``; empty when the checkpoint had none.
        storage_dtypes: A mapping from tensor names to the dtypes in the checkpoint's file.
        companions: The files beside the weights that a repaired folder needs as well: all of
            transformers' layout, and a tokenizer.
        image_size: The height and width of an input image in pixels.
        resizing: What makes the model's pixels of a picture of any size.
        preprocessing: All that is done to an image, for results: open_clip's names of the values,
            and `source`, who tells them.
        mean: The mean of each channel that is subtracted from pixels in [0, 1].
        std: The deviation of each channel that the result is divided by.
        embed_dim: D, the dimension of the joint embedding.
        heads: The memory of zero-shot heads; None to compute each head anew. Use it only for
            models whose weights stay as they are. See `share_heads`.
        layout_obstacle: The reason why no folder of open_clip or transformers can hold the model;
            None if one can.
    """

    layout_obstacle: str | None = None

    def __init__(
        self,
        clip: nn.Module,
        *,
        model_config: Mapping[str, Any],
        preprocess_config: Mapping[str, Any] | None = None,
        name: str = "model",
        storage_dtypes: Mapping[str, torch.dtype] | None = None,
        companions: Mapping[str, bytes] | None = None,
        sha256: str | None = None,
        preprocess_source: str = "open_clip's default",
        warnings: Sequence[str] = (),
        named: str | None = None,
    ) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.name = name
        self.sha256 = sha256
        self.warnings = tuple(warnings)
        self.named = named
        self.model_config = dict(model_config)
        self.preprocess_config = dict(preprocess_config or {})
        self.storage_dtypes: dict[str, torch.dtype] = dict(
            storage_dtypes or {key: tensor.dtype for key, tensor in clip.state_dict().items()}
        )
        self.companions = dict(companions or {})
        size = self.model_config["vision_cfg"].get("image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if height != width:
            raise ArchitectureError(
                f"{name}: input images of {height}x{width} pixels; expected square ones"
            )
        self.image_size = int(height)
        self.embed_dim = int(self.model_config["embed_dim"])
        self.heads: HeadMemo | None = None
        self._text_key: str | None = None
        self._tokenizer: Tokenizer | None = None
        prepared = describe(self.preprocess_config)
        self.preprocessing: dict[str, Any] = {**prepared, "source": preprocess_source}
        self.mean = tuple(prepared["mean"])
        self.std = tuple(prepared["std"])
        self.resizing = Resizing(
            self.image_size,
            prepared["interpolation"],
            prepared["resize_mode"],
            prepared["fill_color"],
            library=prepared["library"],
            resize_size=prepared.get("resize_size"),
        )

    @classmethod
    def from_config(
        cls,
        model_config: Mapping[str, Any],
        *,
        seed: int,
        preprocess_config: Mapping[str, Any] | None = None,
        name: str = "model",
    ) -> OpenClipModel:
        """Build a model with random weights.

        seed: The seed of the weights. torch's global generator does not change.
        Raises ArchitectureError for a configuration that open_clip cannot build.
        """
        clip = build(model_config, seed, name)
        return cls(clip, model_config=model_config, preprocess_config=preprocess_config, name=name)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, *, consume: bool = False) -> OpenClipModel:
        """Build the architecture and load the weights, in float32.

        Args:
            checkpoint: The checkpoint.
            consume: Whether the checkpoint's tensors become the model's if their dtype allows it,
                instead of being copied. This halves the memory, but the checkpoint must not be used
                afterwards.

        Raises:
            ArchitectureError: A tensor is missing, extra or misshapen; the message names all of
                them in one line, and nothing is loaded partially. Or weights are stored as numbers
                that need scales, such as int8.
            CheckpointError: Another loader may take other weights from this file
                (`require_unambiguous`).
        """
        require_unambiguous(checkpoint)
        if checkpoint.model_config is None:
            raise ArchitectureError(
                f"{checkpoint.name}: nothing tells its architecture; name one with model="
            )
        model_config = checkpoint.model_config
        if model_config.get("layout") == "classifier":
            try:
                model_config = with_classes(model_config, checkpoint.state_dict)
            except ArchitectureError as error:
                raise ArchitectureError(f"{checkpoint.name}: {error}") from error
        clip = build(model_config, None, checkpoint.name)
        require_right_activation(checkpoint)
        weights = {k: v for k, v in checkpoint.state_dict.items() if k not in OPENAI_ENTRIES}
        notes: tuple[str, ...] = ()
        if isinstance(clip, Classifier):
            weights = clip.from_file(weights)
        else:
            weights, notes = adapt(weights, clip)
        images_alone = without_texts(weights, clip)
        if images_alone is not None and "layout" not in model_config:
            weights, note = images_alone
            notes = (*notes, note)
            model_config = {**model_config, "layout": "image_tower", "text_cfg": {}}
            clip = build(model_config, None, checkpoint.name)
        expected = clip.state_dict()
        mismatch = describe_mismatch(
            {key: tuple(value.shape) for key, value in expected.items()},
            {key: tuple(value.shape) for key, value in weights.items()},
        )
        if mismatch is not None:
            advice = hint(weights, expected)
            raise ArchitectureError(f"{checkpoint.name}: {mismatch}{advice}")
        _require_plain_weights(checkpoint.name, weights, expected)
        users = Counter(value.untyped_storage().data_ptr() for value in weights.values())
        own = {}
        for key, value in weights.items():
            keep = consume and _has_storage_alone(value, users)
            own[key] = value.to(expected[key].dtype, copy=not keep)
        # Tensors are assigned and not copied, so the memory allocated for them stays unused.
        clip.load_state_dict({key: value.contiguous() for key, value in own.items()}, assign=True)
        if isinstance(clip, Classifier):
            clip.eval().settle(int(model_config["vision_cfg"]["image_size"]))
        return cls(
            clip,
            model_config=model_config,
            preprocess_config=checkpoint.preprocess_config,
            name=checkpoint.name,
            storage_dtypes={key: value.dtype for key, value in weights.items()},
            companions=checkpoint.companions,
            sha256=checkpoint.sha256,
            preprocess_source=checkpoint.preprocess_source,
            warnings=(*checkpoint.warnings, *(f"{checkpoint.name}: {note}" for note in notes)),
            named=checkpoint.named,
        )

    @property
    def visual(self) -> nn.Module:
        """The image tower: normalised images float32 [N, 3, H, W] to embeddings [N, D]."""
        tower = self.clip.visual
        assert isinstance(tower, nn.Module)
        return tower

    @property
    def logit_scale(self) -> float:
        """The factor of cosines in the class logits: exp of the learned temperature."""
        scale = self.clip.logit_scale
        assert isinstance(scale, Tensor)
        return float(scale.exp())

    @property
    def has_texts(self) -> bool:
        """Whether there is a text tower."""
        if isinstance(self.clip, Classifier):
            return False
        return not isinstance(self.clip, Towers) or self.clip.text is not None

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.clip.parameters()).device

    @property
    def num_parameters(self) -> int:
        """The number of weights of both towers."""
        return sum(p.numel() for p in self.clip.parameters())

    def to(self, device: torch.device | str) -> OpenClipModel:
        """Move the weights and return the model."""
        self.clip.to(device)
        return self

    def clone(self) -> OpenClipModel:
        """Return a model with a copy of the weights."""
        twin = copy.copy(self)
        twin.heads, twin.sha256, twin._text_key = None, None, None
        twin.clip = copy.deepcopy(self.clip).eval().requires_grad_(False)
        return twin

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return (pixels - mean) / std for float pixels [N, 3, H, W] in [0, 1]."""
        mean = pixels.new_tensor(self.mean).view(1, -1, 1, 1)
        std = pixels.new_tensor(self.std).view(1, -1, 1, 1)
        return (pixels - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """Return images uint8 [N, 3, H, W] as floats in [0, 1] on the model's device.

        They become floats there, because bytes take a quarter of the time to be sent.
        """
        return images.to(self.device).to(torch.float32) / 255

    def encode_normalized(self, images: Tensor) -> Tensor:
        """Return embeddings [N, D], not normalised, of normalised images float [N, 3, H, W].

        A vision transformer runs as in `models.frozen`, which is faster and equal up to rounding,
        with gradients of its weights where they are wanted.
        """
        tower: FrozenTower | None = None
        if torch.is_grad_enabled():
            tower = trainable(self.visual)
        elif not self.clip.training:
            tower = freeze(self.visual)
        if tower is not None and tower.patch_size is not None:
            return tower(to_patch_rows(images, tower.patch_size))
        embeddings = self.visual(images)
        assert isinstance(embeddings, Tensor)
        return embeddings

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return embeddings [N, D], not normalised, of images float [N, 3, H, W] in [0, 1].

        Raises DataError if the images do not have the model's size.
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise DataError(
                f"images have shape {list(pixels.shape)}; {self.name} expects "
                f"[N, {', '.join(map(str, expected))}]"
            )
        return self.encode_normalized(self.normalize(pixels))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids int64 [n, context_length].

        Raises ArchitectureError when the tokenizer of its text tower is not on this machine, and
        for a model without a text tower.
        """
        if not self.has_texts:
            raise ArchitectureError(
                f"{self.name}: is an image tower alone, without the texts that class names are "
                "compared with; expected a label-free search"
            )
        text = self.model_config.get("text_cfg", {})
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(text, self.companions, self.name)
        return tokenize(self._tokenizer, prompts, text, self.name).to(self.device)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return text embeddings [n, D], not normalised, of token ids [n, context_length]."""
        embeddings = self.clip.encode_text(tokens)  # type: ignore[operator]
        assert isinstance(embeddings, Tensor)
        return embeddings

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[Template]) -> Tensor:
        """Return one unit vector per class, float32 [C, D]: the mean over prompts, normalised.

        For a classifier these are the rows of its last layer, at most of norm 1.

        Source: Radford et al., "Learning Transferable Visual Models From Natural Language
        Supervision" (ICML 2021), section 3.1.4 (prompt ensembling).
        Raises DataError for no class names or no templates, and DeviceMemoryError if not even one
        prompt fits into the memory.
        """
        class_names, templates = given_names(class_names) or (), given_templates(templates)
        if not class_names or not templates:
            raise DataError(
                f"{len(class_names)} class names and {len(templates)} templates; "
                "expected at least one of each"
            )
        if isinstance(self.clip, Classifier):
            rows = self.clip.rows()
            if len(rows) != len(class_names):
                raise DataError(
                    f"{self.name}: is a classifier of {len(rows)} classes, and there are "
                    f"{len(class_names)} class names; expected those of its training, in order"
                )
            return rows
        if self.heads is not None and all(isinstance(t, str) for t in templates):
            text = self._text_key or self._text_digest()
            key = (text, self.device, tuple(class_names), tuple(templates))
            return self.heads.get(key, lambda: self._head(class_names, templates))
        return self._head(class_names, templates)

    def _head(self, class_names: Sequence[str], templates: Sequence[Template]) -> Tensor:
        prompts = [fill_templates(templates, name) for name in class_names]
        tokens = self.tokenize([text for one in prompts for text in one])
        on_cpu = self.device.type == "cpu"
        at_once = _PROMPTS_ON_CPU if on_cpu else _PROMPTS_ON_GPU
        batching = Batching(at_once, self.device, f"{self.name}, prompts")
        with torch.no_grad():
            parts = list(batching.over(len(tokens), lambda part: self.encode_tokens(tokens[part])))
            units = normalize(torch.cat(parts), dim=-1)
            means = [rows.mean(dim=0) for rows in torch.split(units, [len(one) for one in prompts])]
            return normalize(torch.stack(means), dim=-1)

    def share_heads(self, memo: HeadMemo) -> None:
        """Take heads from a memory that several models share, and leave new ones there.

        Call this while the weights lie on the CPU: the text tower is hashed here, and not copied
        back from a GPU for every head.
        """
        self.heads, self._text_key = memo, self._text_digest()

    def _text_digest(self) -> str:
        """Return a hash of everything that text embeddings depend on."""
        config = sorted((k, v) for k, v in self.model_config.items() if k != "vision_cfg")
        tokenizer = sorted(tokenizer_digests(self.model_config, self.companions).items())
        return self._digest(repr((config, tokenizer)), lambda name: not name.startswith("visual."))

    def image_tower_digest(self) -> str:
        """Return a hash of the weights of the image tower, as hex digits."""
        return self._digest("", lambda name: name.startswith("visual."))

    def _digest(self, start: str, counts: Callable[[str], bool]) -> str:
        hasher = hashlib.blake2b(start.encode(), digest_size=32)
        for name, value in self.clip.state_dict().items():
            if counts(name):
                hasher.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                hasher.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    def storage_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the weights on the CPU, in the dtypes of the checkpoint's file."""
        state = {
            key: value.detach().to("cpu", self.storage_dtypes.get(key, value.dtype), copy=True)
            for key, value in self.clip.state_dict().items()
        }
        return self.clip.to_file(state) if isinstance(self.clip, Classifier) else state

    def storage_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor has in the checkpoint's file."""
        return self.storage_dtypes.get(name, torch.float32)


def _require_plain_weights(
    name: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raise ArchitectureError if the file stores a floating-point weight in another dtype."""
    for key, value in weights.items():
        if expected[key].is_floating_point() and value.dtype not in _PLAIN_DTYPES:
            raise ArchitectureError(
                f"{name}: tensor {key!r} is stored as {str(value.dtype).removeprefix('torch.')}, "
                "expected float16, bfloat16, float32 or float64: quantised weights mean nothing "
                "without their scales; dequantise them first"
            )


def _has_storage_alone(tensor: Tensor, users: Mapping[int, int]) -> bool:
    """Return whether a tensor covers its storage and shares it with no other tensor.

    Weights that share memory would change together. users: The number of tensors that use each
    storage, by its address.
    """
    storage = tensor.untyped_storage()
    size = tensor.numel() * tensor.element_size()
    return users[storage.data_ptr()] == 1 and storage.nbytes() == size
