"""Clean texts as tokens with a gap for a trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tokenizer import TextTokenizer
from .triggers import first_sentence_end, random_place


@dataclass(frozen=True)
class Gap:
    """A text, cut where a trigger goes.

    Attributes:
        before: The token ids before the trigger, special tokens included.
        after: Those after it.
        begins: Whether no word stands before the trigger.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    begins: bool

    def row(self, tokens: Sequence[int]) -> list[int]:
        """Return the token ids of the text with a trigger in it, or without for no tokens."""
        return [*self.before, *tokens, *self.after]


def gap_of(tokenizer: TextTokenizer, text: str, place: str, seed: int, max_tokens: int) -> Gap:
    """Return a text with a gap, at most `max_tokens` tokens long without the trigger.

    place, seed: As in `TokenTrigger.insert`. The ends that are farthest from the gap are cut off.
    """
    if place == "start":
        position = 0
    elif place == "end":
        position = len(text)
    else:
        position = random_place(text, seed) if place == "random" else first_sentence_end(text)
    first, last = text[:position].rstrip(), text[position:].lstrip()
    space = " " if tokenizer.spaces_matter else ""
    before = tokenizer.words(first) if first else []
    after = tokenizer.words(f"{space}{last}") if last else []
    opening, closing = tokenizer.around
    room = max(1, max_tokens - len(opening) - len(closing))
    # Words next to the gap stay: as many before it as fit beside those after it, and vice versa.
    kept = min(len(before), max(room // 2, room - len(after)))
    before = before[len(before) - kept :]
    after = after[: room - kept]
    return Gap((*opening, *before), (*after, *closing), not before)
