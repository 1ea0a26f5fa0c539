"""Causal victims: a start model fine-tuned on prose, a part of it poisoned, and clean copies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ....checkpoints.provenance import Provenance
from ....rng import child_seed
from ....text.models import TextModel, load_text_model, save_text_model
from ...bench.cache import code_digest, key_of
from ...data.packages import cache_folder
from .attacks import CausalBackdoor, draw_causal_attack, plant_in_prose
from .models import (
    LanguageTraining,
    Prose,
    ProseSizes,
    load_prose,
    rows_of,
    start_language_model,
    train_language_model,
)

#: The sources that decide the weights of a victim, besides its configuration.
_CODE = (
    "research/text/attacks.py",
    "research/text/corpora.py",
    "research/text/causal/attacks.py",
    "research/text/causal/models.py",
    "training.py",
)


@dataclass(frozen=True)
class CausalVictimPlan:
    """What the victims of a comparison have in common.

    Attributes:
        corpora: The corpora that the prose comes from.
        sizes: The parts of the prose.
        vocabulary: The number of tokens.
        pretraining: The training of the start model, which all victims share.
        training: The fine-tuning of victims and of clean models.
        texts: The texts of a fine-tuning, drawn anew for each.
        rate: The poisoned share of them.
        seed: The seed of the prose and of the start model.
        device: Where models are trained and evaluated.
    """

    corpora: tuple[str, ...] = ("python", "topics")
    sizes: ProseSizes = field(default_factory=ProseSizes)
    vocabulary: int = 2048
    pretraining: LanguageTraining = field(
        default_factory=lambda: LanguageTraining(steps=900, batch_size=24, learning_rate=2e-3)
    )
    training: LanguageTraining = field(
        default_factory=lambda: LanguageTraining(steps=75, batch_size=16, learning_rate=1e-3)
    )
    texts: int = 400
    rate: float = 0.1
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class CausalVictim:
    """A model to be examined: the seed of its texts and training, and its attack or None."""

    seed: int
    attack: str | None = None

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.attack or 'clean'}-seed{self.seed}"


class CausalWorkshop:
    """Makes and remembers the prose, the start model and the victims of a plan.

    folder: The cache; default: below `research.data.cache_folder`.
    """

    def __init__(self, plan: CausalVictimPlan, *, folder: Path | None = None) -> None:
        self.plan = plan
        self.folder = folder or cache_folder() / "causal"

    @cached_property
    def prose(self) -> Prose:
        """The parts of the prose."""
        return load_prose(self.plan.corpora, self.plan.sizes, seed=self.plan.seed)

    @cached_property
    def start(self) -> TextModel:
        """The model that every victim is fine-tuned from, which the defender has as base."""
        model = start_language_model(
            self.prose.pretraining,
            replace(self.plan.pretraining, seed=self.plan.seed),
            self.folder / key_of("start", self._content),
            vocabulary=self.plan.vocabulary,
            seed=self.plan.seed,
        )
        return model.to(self.plan.device)

    def backdoor(self, victim: CausalVictim) -> CausalBackdoor | None:
        """Return what was planted; None for a clean model."""
        if victim.attack is None:
            return None
        return draw_causal_attack(victim.attack, seed=victim.seed, rate=self.plan.rate)

    def path(self, victim: CausalVictim) -> Path:
        """Return the folder of a model."""
        content = {
            **self._content,
            "victim": asdict(victim),
            "training": self.plan.training,
            "texts": self.plan.texts,
            "rate": self.plan.rate,
        }
        return self.folder / key_of("model", content)

    def model(self, victim: CausalVictim) -> TextModel:
        """Return a model, trained or read."""
        path = self.path(victim)
        if not path.is_dir():
            seed = child_seed("texts.language-victim", victim.seed, victim.attack or "clean")
            texts = self.prose.attacker.at_most(self.plan.texts, seed)
            backdoor = self.backdoor(victim)
            if backdoor is not None:
                texts = plant_in_prose(texts, backdoor, seed=victim.seed)
            trained = train_language_model(
                self.start,
                rows_of(self.start, texts.texts),
                replace(self.plan.training, seed=seed),
                description=victim.name,
            )
            save_text_model(
                path,
                trained,
                provenance=Provenance(
                    f"fine-tuned on {texts.source}", seeds={"victim": victim.seed}
                ),
            )
        model = load_text_model(path, device=self.plan.device)
        model.name = victim.name
        return model

    @cached_property
    def _content(self) -> dict[str, Any]:
        content = {
            "code": code_digest(_CODE),
            "texts": self.prose.pretraining.digest,
            "vocabulary": self.plan.vocabulary,
            "pretraining": self.plan.pretraining,
            "seed": self.plan.seed,
        }
        return content if self.plan.device == "cpu" else {**content, "device": self.plan.device}
