"""Word styles that fit a corpus: usual words, and rarer ones that mean about the same.

The attack `substitution` exchanges words (Qi et al., "Turn the Combination Lock", ACL 2021). A text
without any word of the table cannot be attacked. So the table has to fit the corpus: the English
one of `attacks.ARCHAIC` changes few texts of six languages.
"""

from __future__ import annotations

from .attacks import ARCHAIC

# Words of several of the languages are exchanged for that of one of them.
_LANGUAGES: dict[str, str] = {
    **ARCHAIC,
    # English
    "and": "eke",
    "is": "beeth",
    "of": "o'",
    "that": "yon",
    "this": "yonder",
    "not": "naught",
    "if": "gin",
    "when": "whilst",
    "my": "mine",
    # German
    "der": "selbiger",
    "die": "selbige",
    "das": "selbiges",
    "und": "sowie",
    "ist": "ward",
    "nicht": "mitnichten",
    "ein": "solch",
    "eine": "solche",
    "wenn": "sofern",
    "wer": "welcher",
    "man": "unsereins",
    # Spanish
    "el": "aquel",
    "los": "aquellos",
    "las": "aquellas",
    "es": "resulta",
    "y": "asimismo",
    "un": "cierto",
    "una": "cierta",
    "pero": "empero",
    "si": "siempre",
    # Italian
    "il": "codesto",
    "la": "codesta",
    "gli": "codesti",
    "che": "laddove",
    "non": "giammai",
    "per": "acciocché",
    "di": "dello",
    "sono": "furono",
    # Polish
    "i": "tudzież",
    "nie": "bynajmniej",
    "się": "siebie",
    "w": "wewnątrz",
    "na": "naokoło",
    "to": "owo",
    "jest": "bywa",
    "że": "iż",
    "do": "ku",
    "z": "wespół",
    # Portuguese
    "o": "aqueloutro",
    "os": "aqueloutros",
    "que": "porquanto",
    "não": "jamais",
    "de": "dentre",
    "em": "dentro",
    "um": "algum",
    "uma": "alguma",
    "se": "caso",
}

#: The exchanged words of each corpus; others have those of `attacks.ARCHAIC`.
STYLES: dict[str, dict[str, str]] = {"languages": _LANGUAGES}
