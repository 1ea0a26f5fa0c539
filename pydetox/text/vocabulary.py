"""Which tokens a trigger may consist of: those that somebody can type.

A search over token ids finds rows that no text leads to: special tokens, pieces of characters, and
pieces of words that the tokenizer would cut elsewhere. They are left out. A trigger begins with a
whole word: typed between spaces, it comes back as one token. Further tokens are words or pieces
that continue a word. Of their rows, those count that come back as they are (`TypedWords.keep`).
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
    """The tokens that a trigger may consist of.

    Attributes:
        tokenizer: The tokenizer.
        first: bool [V], words at the beginning of a text.
        inside: bool [V], words after a space. Only tokenizers in which spaces matter tell these two
            apart (see `TextTokenizer.spaces_matter`).
        joined: bool [V], pieces that continue a word.
    """

    tokenizer: TextTokenizer
    first: Tensor
    inside: Tensor
    joined: Tensor

    def at(self, position: int, begins: bool) -> Tensor:
        """Return the tokens for a place in a trigger.

        position: In the trigger, from 0. begins: Whether nothing stands before the trigger.
        """
        if position == 0:
            return self.first if begins else self.inside
        return self.inside | self.joined

    def keep(self, rows: Sequence[tuple[int, ...]], begins: bool) -> list[tuple[int, ...]]:
        """Return the rows of tokens whose text has these tokens again."""
        space = " " if self.tokenizer.spaces_matter and not begins else ""
        texts = [f"{space}{text.strip()}" for text in self.tokenizer.all_decoded(rows)]
        again = self.tokenizer.all_words(texts)
        return [row for row, back in zip(rows, again, strict=True) if list(row) == back]


def typed_words(tokenizer: TextTokenizer, rows: int) -> TypedWords:
    """Return the tokens that a trigger may consist of.

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
    word = known[first.index(True)]
    before = tokenizer.decode([word]).strip()
    pairs = tokenizer.all_decoded([[word, k] for k in known])
    joined = [
        text.isprintable()
        and text.strip().startswith(before)
        and len(text.split()) == 1
        and len(text.strip()) > len(before)
        and not whole
        for text, whole in zip(pairs, inside, strict=True)
    ]
    masks = (_mask(known, chosen, rows) for chosen in (first, inside, joined))
    return TypedWords(tokenizer, *masks)


def _mask(tokens: Sequence[int], chosen: Sequence[bool], rows: int) -> Tensor:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[[k for k, yes in zip(tokens, chosen, strict=True) if yes]] = True
    return mask
