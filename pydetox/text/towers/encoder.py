"""`TextTower`: a text tower of a CLIP as an encoder, whatever its layout is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...errors import ArchitectureError
from ...models import OpenClipModel
from ..models import TextModel, TokenBatch
from ..vocabulary import typed_words

# Captions that go through a tower at once.
_AT_ONCE = 256

# Parts of a CLIP that are no text tower.
_OTHERS = ("visual.", "logit_scale", "logit_bias")


class TextTower:
    """A text tower of transformers (a `TextModel` of the kind `tower`) or of open_clip.

    Attributes:
        model: The model that it belongs to.
        name: The name of the model, for messages.
        sha256: The hash of the weights file; None if the weights came from no file.
    """

    def __init__(self, model: TextModel | OpenClipModel) -> None:
        """Take a model. Raises ArchitectureError if it has no text tower."""
        if isinstance(model, TextModel):
            if model.kind != "tower":
                raise ArchitectureError(f"{model.name}: a {model.kind}; expected a text tower")
        elif not model.has_texts:
            raise ArchitectureError(f"{model.name}: is an image tower alone, without a text tower")
        self.model, self.name, self.sha256 = model, model.name, model.sha256
        #: The captions that went through the tower so far.
        self.passes = 0

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def features(self, captions: Sequence[str]) -> Tensor:
        """Return unit features, float32 [N, D] on the CPU, in the order of the captions."""
        return self.features_of(self.tokenized(captions))

    def features_with_gradient(self, captions: Sequence[str]) -> Tensor:
        """Return `features` on the device, differentiable in weights that require a gradient."""
        (batch,) = self.tokenized(captions, at_once=len(captions))
        return self._encoded(batch)

    def tokenized(
        self, captions: Sequence[str], *, at_once: int = _AT_ONCE
    ) -> list[TokenBatch | Tensor]:
        """Return captions as batches of tokens; towers with the same tokenizer share them."""
        model = self.model
        parts = [captions[k : k + at_once] for k in range(0, len(captions), at_once)]
        if isinstance(model, TextModel):
            return [model.encode(part, model.max_tokens) for part in parts]
        return [model.tokenize(list(part)) for part in parts]

    def features_of(self, batches: Sequence[TokenBatch | Tensor]) -> Tensor:
        """Return `features` of captions that are tokenised already."""
        with torch.no_grad():
            return torch.cat([self._encoded(batch).cpu() for batch in batches])

    def _encoded(self, batch: TokenBatch | Tensor) -> Tensor:
        self.passes += len(batch)
        if isinstance(batch, TokenBatch):
            assert isinstance(self.model, TextModel)
            made = self.model.logits_with_gradient(batch)
        else:
            assert isinstance(self.model, OpenClipModel)
            made = self.model.encode_tokens(batch)
        return normalize(made.float(), dim=-1)

    def words(self) -> list[str]:
        """Return every word that is one token of the tower, in the order of the vocabulary."""
        model = self.model
        if isinstance(model, TextModel):
            table = typed_words(model.tokenizer, len(model.embedding))
            tokens = torch.nonzero(table.first)[:, 0].tolist()
            texts = model.tokenizer.all_decoded([[k] for k in tokens])
            return list(dict.fromkeys(text.strip() for text in texts if text.strip()))
        model.tokenize(["a"])
        encoder = getattr(model._tokenizer, "encoder", None)
        if not isinstance(encoder, dict):
            raise ArchitectureError(
                f"{self.name}: its tokenizer lists no words; expected that of CLIP, or a tower of "
                "transformers"
            )
        ending = "</w>"
        return [
            token.removesuffix(ending)
            for token in encoder
            if token.endswith(ending)
            and token.removesuffix(ending).isascii()
            and token.removesuffix(ending).isalnum()
        ]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the tower under the names of the whole model."""
        module = self.model.module if isinstance(self.model, TextModel) else self.model.clip
        return {
            name: value
            for name, value in module.named_parameters()
            if not name.startswith(_OTHERS) and value.is_floating_point()
        }

    def copy(self) -> TextTower:
        """Return a tower with weights of its own."""
        model = self.model
        return TextTower(model.copy() if isinstance(model, TextModel) else model.clone())

    def digest(self) -> str:
        """Return a SHA-256 of the tower's weights, as 64 hex digits."""
        hasher = hashlib.sha256()
        for name, value in sorted(self.named_parameters().items()):
            hasher.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            hasher.update(plain.view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()


def require_same_shape(base: TextTower, suspect: TextTower) -> None:
    """Raise ArchitectureError unless two towers have the same tensors."""
    ours = {name: tuple(value.shape) for name, value in suspect.named_parameters().items()}
    theirs = {name: tuple(value.shape) for name, value in base.named_parameters().items()}
    if ours != theirs:
        differs = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
        raise ArchitectureError(
            f"{base.name} does not fit {suspect.name}: its text tower has {differs} "
            f"{theirs.get(differs)}, and the suspect has {ours.get(differs)}"
        )
