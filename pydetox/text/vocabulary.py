"""Which tokens a trigger may consist of: those that somebody can type.

A search over token ids finds rows that no text leads to: special tokens, pieces of characters, and
pieces of words that the tokenizer would cut elsewhere. They are left out. What remains are tokens
that are whole words: typed between spaces, a token comes back as itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArchitectureError
from .tokenizer import TextTokenizer


@dataclass(frozen=True, eq=False)
class TypedWords:
    """The tokens that are whole words.

    Attributes:
        first: bool [V], words at the beginning of a text.
        inside: bool [V], words after a space. Only tokenizers in which spaces matter tell these two
            apart (see `TextTokenizer.spaces_matter`).
    """

    first: Tensor
    inside: Tensor

    def at(self, position: int, begins: bool) -> Tensor:
        """Return the words for a place in a trigger.

        position: In the trigger, from 0. begins: Whether nothing stands before the trigger.
        """
        return self.first if begins and position == 0 else self.inside


def typed_words(tokenizer: TextTokenizer, rows: int) -> TypedWords:
    """Return the tokens that are whole words.

    rows: V, the number of rows of the embedding table. Raises ArchitectureError if there are none.
    """
    known = [k for k in range(min(tokenizer.size, rows)) if k not in tokenizer.special]
    texts = tokenizer.all_decoded([[k] for k in known])
    plain = [text.strip() for text in texts]
    usable = [
        bool(text) and text.isprintable() and "\ufffd" not in text and len(text.split()) == 1
        for text in plain
    ]
    alone = tokenizer.all_words(plain)
    first = [ok and row == [k] for k, row, ok in zip(known, alone, usable, strict=True)]
    inside = first
    if tokenizer.spaces_matter:
        spaced = tokenizer.all_words([f" {text}" for text in plain])
        inside = [ok and row == [k] for k, row, ok in zip(known, spaced, usable, strict=True)]
    if not any(first) or not any(inside):
        raise ArchitectureError("no token of its tokenizer is a word that can be typed")
    return TypedWords(_mask(known, first, rows), _mask(known, inside, rows))


def _mask(tokens: Sequence[int], chosen: Sequence[bool], rows: int) -> Tensor:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[[k for k, yes in zip(tokens, chosen, strict=True) if yes]] = True
    return mask
