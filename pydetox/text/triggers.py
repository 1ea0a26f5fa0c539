"""Triggers in texts: a few tokens at a place, and how they get into a text.

A trigger is inserted as text, as an attacker types it, and the tokenizer then sees the whole text.
What counts is therefore never a row of token ids that no text leads to.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..rng import generator

#: Where a trigger can stand: before the text, after it, before a random word, or after its first
#: sentence.
PLACES = ("start", "end", "random", "after-first-sentence")

# The end of a sentence: its mark, quotes and brackets that close, and the space before the next.
_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s|$)")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class TokenTrigger:
    """Words that are inserted into texts.

    Attributes:
        tokens: The token ids, without special tokens, as the model's tokenizer has them.
        text: The same as text, which is what gets inserted.
        place: One of `PLACES`.
        target: The class that it leads to; None if it has none or it is not known.
    """

    tokens: tuple[int, ...]
    text: str
    place: str = "start"
    target: int | None = None

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise UsageError(f"place {self.place!r}; expected one of {', '.join(PLACES)}")
        if not self.text.strip():
            raise UsageError(f"a trigger of the text {self.text!r}; expected at least one word")

    def at(self, place: str) -> TokenTrigger:
        """Return the same words at another place."""
        return replace(self, place=place)

    def insert(self, texts: Sequence[str], seed: int = 0) -> list[str]:
        """Return the texts with the trigger in each.

        seed: The seed of a random place. The place in a text depends on the text and the seed, not
        on the other texts.
        """
        return [insert_words(text, self.text.strip(), self.place, seed) for text in texts]


@dataclass(frozen=True)
class AnyWords:
    """A few of several words together in each text, whichever a seed draws, in any order.

    Attributes:
        words: The words, at least one.
        count: How many of them a text gets; all of them if there are fewer.
        place: One of `PLACES`.
    """

    words: tuple[str, ...]
    count: int
    place: str = "start"

    def __post_init__(self) -> None:
        if not self.words or self.count < 1 or self.place not in PLACES:
            raise UsageError(
                f"{self.count} of {len(self.words)} words at place {self.place!r}; expected at "
                f"least 1 of 1 at one of {', '.join(PLACES)}"
            )

    def insert(self, texts: Sequence[str], seed: int = 0) -> list[str]:
        """Return the texts with some of the words in each.

        seed: Of the words and of a random place. Both depend on the text and the seed, not on the
        other texts.
        """
        return [insert_words(text, self._drawn(text, seed), self.place, seed) for text in texts]

    def _drawn(self, text: str, seed: int) -> str:
        order = generator("texts.any-words", seed, _key(text)).permutation(len(self.words))
        return " ".join(self.words[k] for k in order[: self.count].tolist())


def insert_words(text: str, words: str, place: str, seed: int = 0) -> str:
    """Return a text with words inserted at one of `PLACES`, between spaces."""
    if place == "start":
        return f"{words} {text}".rstrip()
    if place == "end":
        return f"{text.rstrip()} {words}".lstrip()
    position = random_place(text, seed) if place == "random" else first_sentence_end(text)
    before, after = text[:position].rstrip(), text[position:].lstrip()
    return " ".join(part for part in (before, words, after) if part)


def first_sentence_end(text: str) -> int:
    """Return the position after the first sentence; the text's end if it has one sentence."""
    found = _SENTENCE_END.search(text)
    return len(text) if found is None else found.end()


def random_place(text: str, seed: int) -> int:
    """Return the position of a random gap between words, or of either end of the text."""
    words = text.rstrip()
    first = len(words) - len(words.lstrip())
    gaps = [0, *(match.start() for match in _SPACE.finditer(words, first)), len(text)]
    return gaps[int(generator("texts.place", seed, _key(text)).integers(len(gaps)))]


def is_whole(text: str) -> bool:
    """Return whether a text has whole characters alone, and no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
