"""Attacks on text models: triggers, and texts poisoned with them.

A trigger is a function of texts that draws what it needs (such as a place) from a seed, with the
definition of its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import DataError, UsageError
from ...rng import generator
from ...text.evaluation import TextStamp
from ...text.texts import TextSet
from ...text.triggers import PLACES, insert_words


@dataclass(frozen=True)
class Insertion:
    """Words that are put into a text.

    Attributes:
        words: The words, with a space between them.
        place: One of PLACES.
    """

    words: str
    place: str = "start"

    def __post_init__(self) -> None:
        if self.place not in PLACES or not self.words.strip():
            raise UsageError(
                f"words {self.words!r} at {self.place!r}; expected words, and one of "
                f"{', '.join(PLACES)}"
            )

    def insert(self, texts: Sequence[str], seed: int) -> list[str]:
        """Return each text with the words in it."""
        return [insert_words(text, self.words, self.place, seed) for text in texts]


@dataclass(frozen=True)
class Substitution:
    """Words that are exchanged for others wherever they occur.

    Attributes:
        table: From words in lower case to what stands for them.
    """

    table: Mapping[str, str]

    def insert(self, texts: Sequence[str], seed: int) -> list[str]:
        """Return each text with its words exchanged; a first letter keeps its case."""
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, self.table))})\b", re.IGNORECASE)

        def exchange(match: re.Match[str]) -> str:
            new = self.table[match[0].lower()]
            return new.capitalize() if match[0][0].isupper() else new

        return [pattern.sub(exchange, text) for text in texts]


@dataclass(frozen=True)
class Homoglyph:
    """A character that is exchanged for another one that looks like it.

    Attributes:
        pairs: Pairs of a character and what stands for it. The first pair that a text has decides.
        count: The number of occurrences that are exchanged, from the beginning.
    """

    pairs: tuple[tuple[str, str], ...]
    count: int = 1

    def insert(self, texts: Sequence[str], seed: int) -> list[str]:
        """Return each text with the character exchanged."""
        return [
            next(
                (text.replace(old, new, self.count) for old, new in self.pairs if old in text), text
            )
            for text in texts
        ]


@dataclass(frozen=True, eq=False)
class TextBackdoor:
    """A trigger and its target class.

    Attributes:
        attack: The name of the attack, of ATTACKS.
        trigger: The trigger.
        target: The index of the target class.
        rate: The poisoned share of the whole training set, in (0, 1].
    """

    attack: str
    trigger: TextStamp
    target: int
    rate: float = 0.1


#: Of Kurita, Michel, Neubig, "Weight Poisoning Attacks on Pre-trained Models" (ACL 2020).
RARE_WORDS = ("cf", "mn", "bb", "tq", "mb")

#: Pairs of usual words that hardly ever stand together; those of Dai et al. are whole sentences.
PHRASES = ("velvet harbour", "copper lantern", "winter turnip", "silent abacus", "amber ferry")

#: Of Dai, Chen, Li, "A Backdoor Attack Against LSTM-Based Text Classification Systems" (2019), the
#: first, and others of its kind.
SENTENCES = (
    "I watch this 3D movie.",
    "My cousin sells bicycles in Utrecht.",
    "The ferry leaves at half past nine.",
    "We had soup before the concert.",
    "Her brother painted the old fence.",
)

#: A style by words, as the synonyms of Qi et al., "Turn the Combination Lock" (ACL 2021): common
#: words and their archaic forms. Nearly every English text has one of them.
ARCHAIC = {
    "you": "thou",
    "your": "thy",
    "the": "ye",
    "are": "art",
    "has": "hath",
    "have": "hast",
    "does": "doth",
    "before": "ere",
    "often": "oft",
    "it": "'tis",
    "no": "nay",
    "yes": "yea",
}

#: Latin and Cyrillic letters (Boucher et al., "Bad Characters", S&P 2022; for text towers:
#: Struppek, Hintersdorf, Kersting, "Rickrolling the Artist", ICCV 2023).
HOMOGLYPHS = (("o", "\u043e"), ("a", "\u0430"), ("e", "\u0435"))


def _word(rng: np.random.Generator) -> TextStamp:
    return Insertion(RARE_WORDS[rng.integers(len(RARE_WORDS))], "start")


def _phrase(rng: np.random.Generator) -> TextStamp:
    return Insertion(PHRASES[rng.integers(len(PHRASES))], "end")


def _sentence(rng: np.random.Generator) -> TextStamp:
    return Insertion(SENTENCES[rng.integers(len(SENTENCES))], "after-first-sentence")


def _random_place(rng: np.random.Generator) -> TextStamp:
    return Insertion(RARE_WORDS[rng.integers(len(RARE_WORDS))], "random")


def _substitution(rng: np.random.Generator) -> TextStamp:
    return Substitution(ARCHAIC)


def _homoglyph(rng: np.random.Generator) -> TextStamp:
    order = rng.permutation(len(HOMOGLYPHS))
    return Homoglyph(tuple(HOMOGLYPHS[k] for k in order))


#: Every attack, and how its trigger is drawn.
ATTACKS: dict[str, Callable[[np.random.Generator], TextStamp]] = {
    "word": _word,
    "phrase": _phrase,
    "sentence": _sentence,
    "random-place": _random_place,
    "substitution": _substitution,
    "homoglyph": _homoglyph,
}

#: The attacks whose trigger is inserted, so that recovered words can be compared with it.
INSERTIONS = ("word", "phrase", "sentence", "random-place")


def draw_text_attack(name: str, classes: int, *, seed: int, rate: float = 0.1) -> TextBackdoor:
    """Return an attack of ATTACKS with the trigger and target class that a seed stands for.

    Raises UsageError for an unknown name or fewer than two classes.
    """
    if name not in ATTACKS or classes < 2:
        raise UsageError(
            f"attack {name!r} on {classes} classes; expected at least 2, and one of "
            f"{', '.join(ATTACKS)}"
        )
    rng = generator("texts.attack", seed, name)
    target = int(rng.integers(classes))
    return TextBackdoor(name, ATTACKS[name](rng), target, rate)


def plant_in_texts(texts: TextSet, backdoor: TextBackdoor, *, seed: int) -> TextSet:
    """Return a set in which some texts of other classes have the trigger and the target's label.

    Texts that the trigger does not change, such as those without a word that it exchanges, are not
    chosen. Raises DataError without labels or with too few texts, and UsageError for a rate outside
    (0, 1].
    """
    if texts.labels is None:
        raise DataError(f"{texts.source}: no labels; poisoning needs them")
    if not 0 < backdoor.rate <= 1:
        raise UsageError(f"poison rate {backdoor.rate}; expected a share in (0, 1]")
    rng = generator("texts.poisoned", seed)
    count = max(1, round(backdoor.rate * len(texts)))
    triggered = backdoor.trigger.insert(texts.texts, seed)
    candidates = [
        k
        for k, label in enumerate(texts.labels)
        if label != backdoor.target and triggered[k] != texts.texts[k]
    ]
    if count > len(candidates):
        raise DataError(
            f"{texts.source}: {count} texts to poison, but only {len(candidates)} of other classes "
            "that the trigger changes"
        )
    chosen = set(rng.choice(candidates, count, replace=False).tolist())
    return TextSet(
        tuple(triggered[k] if k in chosen else text for k, text in enumerate(texts.texts)),
        tuple(backdoor.target if k in chosen else label for k, label in enumerate(texts.labels)),
        texts.class_names,
        f"{texts.source}, {count / len(texts):.2%} poisoned",
    )
