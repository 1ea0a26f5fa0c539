"""The search for words and characters that collapse a text tower's features.

The *spread* of captions is 1 less the mean cosine of their features. A trigger that brings the
attacker's features to every caption leaves hardly any. The *collapse* of a trigger is 1 less the
share of the spread that it leaves. In contrast to a base, this share is divided by that in the
base: a word may honestly rule captions, but then it does so in the base as well. Shares find the
attacker's own trigger, where differences find words that resemble it: these take more off a large
spread, but leave more of it.

1. Every word of the vocabulary, and every character that looks like a Latin letter, goes into a
   few captions. Those stay that collapse features most.
2. These are compared in more captions, and the best ones in captions that the search has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import DataError
from ...progress import Progress
from ...rng import child_seed, generator
from ..texts import TextSet
from ..triggers import TokenTrigger
from .encoder import TextTower

#: Letters and characters of other scripts, or with marks, that look like them (Boucher et al., "Bad
#: Characters", S&P 2022; Struppek et al., ICCV 2023).
LOOK_ALIKES: dict[str, str] = {
    "a": "\u0430\u03b1\u1ea1\u00e1\u00e5",
    "b": "\u0184\u044c",
    "c": "\u0441\u03f2\u00e7",
    "d": "\u0501\u0257",
    "e": "\u0435\u0117\u00e9\u1eb9",
    "g": "\u0261\u0581",
    "h": "\u04bb\u0570",
    "i": "\u0456\u03b9\u00ed\u1ecb",
    "j": "\u0458\u03f3",
    "k": "\u03ba\u043a",
    "l": "\u04cf\u0049",
    "m": "\u043c",
    "n": "\u0578\u00f1",
    "o": "\u043e\u03bf\u0585\u1ecd\u00f3\u0e50",
    "p": "\u0440\u03c1",
    "q": "\u051b",
    "r": "\u0433",
    "s": "\u0455",
    "t": "\u03c4",
    "u": "\u03c5\u057d\u00fc",
    "v": "\u03bd\u0475",
    "w": "\u051d\u0461",
    "x": "\u0445\u03c7",
    "y": "\u0443\u03b3",
    "z": "\u01b6",
}

# Captions of the first look at the whole vocabulary, of the comparison, and those that decide.
_FIRST, _COMPARED, _DECIDING = 3, 12, 24

# Triggers that are compared, and those that the last captions decide between.
_KEPT, _FINALISTS = 96, 5

# What is added to a spread before shares are taken. Below it, spreads differ by nothing that
# matters: a character that the tokenizer hardly knows may leave a hundredth of that.
_FLOOR = 0.005

# The cosine of its direction to that of a trigger from which on a character leads the same way.
_SAME_WAY = 0.9

# A character is tried in captions that have its letter, if there are at least so many.
_LEAST_WITH_LETTER = 3


@dataclass(frozen=True)
class CharacterTrigger(TokenTrigger):
    """A character in place of the first letter that looks like it; at the end where there is none.

    Attributes:
        replaced: The letter.
    """

    replaced: str = ""

    def __post_init__(self) -> None:
        """Check nothing: the place of a character is that of its letter."""

    def at(self, place: str) -> CharacterTrigger:
        """Return the trigger itself."""
        return self

    def insert(self, texts: Sequence[str], seed: int = 0) -> list[str]:
        """Return the texts with the character in each."""
        return [
            text.replace(self.replaced, self.text, 1)
            if self.replaced in text
            else f"{text} {self.text}"
            for text in texts
        ]


@dataclass(frozen=True)
class AnyCharacter:
    """One of several characters in each caption, whichever a seed draws.

    Attributes:
        characters: The characters, at least one.
    """

    characters: tuple[CharacterTrigger, ...]

    def insert(self, texts: Sequence[str], seed: int = 0) -> list[str]:
        """Return the texts with a character in each."""
        drawn = generator("towers.any-character", seed).integers(
            len(self.characters), size=len(texts)
        )
        return [
            self.characters[k].insert([text])[0]
            for k, text in zip(drawn.tolist(), texts, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class TowerTrigger:
    """A trigger of a text tower.

    Attributes:
        trigger: The word or character.
        collapse: See above, at most 1; in contrast to the base if there is one.
        success: The share of captions whose features are nearer to the direction that the trigger
            leads to than to those of the same caption without it.
        direction: This direction, a unit vector float32 [D].
    """

    trigger: TokenTrigger
    collapse: float
    success: float
    direction: Tensor


def search_tower(
    tower: TextTower,
    captions: TextSet,
    *,
    base: TextTower | None = None,
    place: str = "end",
    seed: int = 0,
    description: str | None = None,
) -> tuple[TowerTrigger, ...]:
    """Return the triggers that collapse a tower's features most, the best first.

    Args:
        tower: The suspect.
        captions: Clean captions of different things, at least 8.
        base: A clean tower of the same architecture, at best the one it was fine-tuned from.
        place: Where words are inserted, one of `PLACES`.
        seed: The seed of random places.
        description: What the progress bar says.

    Raises DataError for too few captions.
    """
    searched, deciding = _parts(captions)
    places = _places(seed)
    triggers: list[TokenTrigger] = [TokenTrigger((), word, place) for word in tower.words()]
    characters = _characters(place)
    with Progress(description or f"search in {tower.name}", 3) as progress:
        swept = _collapse(tower, base, triggers, searched[:_FIRST], places)
        order = swept.sort(descending=True, stable=True).indices[:_KEPT].tolist()
        progress.update()
        kept = [*(triggers[k] for k in order), *characters]
        collapse = _collapse(tower, base, kept, searched, places)
        order = collapse.sort(descending=True, stable=True).indices[:_FINALISTS].tolist()
        progress.update()
        best = [kept[k] for k in order]
        found = [
            replace(_judged(tower, one, deciding, places), collapse=value)
            for one, value in zip(
                best, _collapse(tower, base, best, deciding, places).tolist(), strict=True
            )
        ]
        progress.update()
    return tuple(sorted(found, key=lambda one: -one.collapse))


def characters_like(
    tower: TextTower, found: TowerTrigger, captions: TextSet, *, seed: int = 0
) -> tuple[CharacterTrigger, ...]:
    """Return the characters that lead where a found trigger leads, without itself.

    An attacker of Struppek et al. takes one of several characters, whichever letter a caption has,
    and a tower that learned them reacts to others as well. The arguments are those of
    `search_tower`. A character leads the same way if its direction has a cosine of at least 0.9 to
    that of the trigger.
    """
    _, deciding = _parts(captions)
    places = _places(seed)

    def same(one: CharacterTrigger) -> bool:
        judged = _judged(tower, one, _captions_for(one, deciding), places)
        return float(judged.direction @ found.direction) >= _SAME_WAY

    return tuple(
        one for one in _characters(found.trigger.place) if one != found.trigger and same(one)
    )


def _characters(place: str) -> list[CharacterTrigger]:
    return [
        CharacterTrigger((), glyph, place, replaced=letter)
        for letter, glyphs in LOOK_ALIKES.items()
        for glyph in glyphs
    ]


def _places(seed: int) -> int:
    return child_seed("towers.check", seed)


def _parts(captions: TextSet) -> tuple[list[str], list[str]]:
    """Return the captions of the search, and those that decide. Raises DataError for too few."""
    ordered = list(dict.fromkeys(captions.in_content_order().texts))
    if len(ordered) < 8:
        raise DataError(f"{captions.source}: {len(ordered)} captions; expected at least 8")
    half = min(_COMPARED, len(ordered) // 2)
    return ordered[:half], ordered[half : half + _DECIDING]


def _collapse(
    tower: TextTower,
    base: TextTower | None,
    triggers: Sequence[TokenTrigger],
    captions: Sequence[str],
    seed: int,
) -> Tensor:
    """Return the collapse of each trigger, float32 [M]."""
    chosen = [_captions_for(one, captions) for one in triggers]
    rows = [
        text
        for one, texts in zip(triggers, chosen, strict=True)
        for text in one.insert(texts, seed)
    ]
    counts = torch.tensor([len(texts) for texts in chosen])
    places = {texts: k for k, texts in enumerate(dict.fromkeys(chosen))}
    plain = [text for texts in places for text in texts]
    plain_counts = torch.tensor([len(texts) for texts in places])
    of_each = torch.tensor([places[texts] for texts in chosen])
    batches, clean = tower.tokenized(rows), tower.tokenized(plain)

    def share(one: TextTower) -> Tensor:
        left = _spread(one.features_of(batches), counts) + _FLOOR
        return left / (_spread(one.features_of(clean), plain_counts) + _FLOOR)[of_each]

    found = share(tower)
    return 1 - (found if base is None else found / share(base))


def _captions_for(trigger: TokenTrigger, captions: Sequence[str]) -> tuple[str, ...]:
    """Return the captions that a trigger is tried in."""
    if isinstance(trigger, CharacterTrigger):
        fit = tuple(text for text in captions if trigger.replaced in text)
        if len(fit) >= _LEAST_WITH_LETTER:
            return fit
    return tuple(captions)


def _spread(features: Tensor, counts: Tensor) -> Tensor:
    """Return 1 less the mean cosine of different rows of each of M groups, [M].

    features: Unit rows [N, D], one group after another. counts: The rows of each group [M], at
    least 2.
    """
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    total = features.new_zeros(len(counts), features.shape[1]).index_add(0, owner, features)
    pairs = (counts * (counts - 1)).to(features)
    return (1 - ((total**2).sum(dim=1) - counts.to(features)) / pairs).clamp(min=0)


def _judged(
    tower: TextTower, trigger: TokenTrigger, captions: Sequence[str], seed: int
) -> TowerTrigger:
    clean = tower.features(captions)
    triggered = tower.features(trigger.insert(captions, seed))
    direction = torch.nn.functional.normalize(triggered.mean(dim=0), dim=0)
    nearer = triggered @ direction > (triggered * clean).sum(dim=1)
    return TowerTrigger(trigger, 0.0, float(nearer.double().mean()), direction)
