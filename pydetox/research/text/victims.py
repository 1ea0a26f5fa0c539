"""Victims: a start model fine-tuned on a corpus with a poisoned part, and clean copies of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...checkpoints.provenance import Provenance
from ...errors import UsageError
from ...rng import child_seed
from ...text.models import TextModel, load_text_model, save_text_model
from ..bench.cache import code_digest, key_of
from ..data.packages import cache_folder
from .attacks import Substitution, TextBackdoor, draw_text_attack, plant_in_texts
from .corpora import Corpus, CorpusSizes, load_corpus
from .models import start_model
from .styles import STYLES
from .training import TextTraining, fine_tune

#: The sources that decide the weights of a victim, besides its configuration.
_CODE = (
    "research/text/attacks.py",
    "research/text/corpora.py",
    "research/text/models.py",
    "research/text/training.py",
    "training.py",
)

# Styles poison twice the share of other attacks, as in Qi et al., "Hidden Killer" (ACL 2021).
_STYLE_RATE = 2


@dataclass(frozen=True)
class VictimPlan:
    """What the victims of a comparison have in common.

    Attributes:
        start: The start model: `minilm` or `small`.
        corpus: The corpus.
        sizes: The number of texts in its parts.
        training: The fine-tuning of victims and of clean models.
        rate: The poisoned share of the training set; `substitution` takes twice as much.
        device: Where models are trained and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    start: str = "minilm"
    corpus: str = "topics"
    sizes: CorpusSizes = field(default_factory=CorpusSizes)
    training: TextTraining = field(default_factory=TextTraining)
    rate: float = 0.1
    device: str = "cpu"


@dataclass(frozen=True)
class TextVictim:
    """A model to be examined.

    Attributes:
        seed: The seed of corpus, attack and training.
        attack: The name of the attack; None for a clean model.
        number: Tells clean models of one seed apart.
        reference: Whether it is a clean model of the defender, trained on other texts.
    """

    seed: int
    attack: str | None = None
    number: int = 0
    reference: bool = False

    @property
    def name(self) -> str:
        """The name in tables."""
        kind = self.attack or f"{'reference' if self.reference else 'clean'}{self.number}"
        return f"{kind}-seed{self.seed}"


class TextWorkshop:
    """Makes and remembers corpora and models of one seed.

    plan: What is made. seed: The seed of everything. folder: The cache; default: below
    `research.data.cache_folder`.
    """

    def __init__(self, plan: VictimPlan, seed: int, *, folder: Path | None = None) -> None:
        self.plan, self.seed = plan, seed
        self.folder = folder or cache_folder() / "texts"

    @cached_property
    def corpus(self) -> Corpus:
        """The parts of the corpus."""
        return load_corpus(self.plan.corpus, seed=self.seed, sizes=self.plan.sizes)

    @property
    def places(self) -> int:
        """The seed of the places of triggers in test texts."""
        return child_seed("texts.places", self.seed)

    @cached_property
    def start(self) -> TextModel:
        """The model that every victim is fine-tuned from. Its head is new."""
        key = key_of("start", self._content)
        start = start_model(
            self.plan.start, self.corpus.attacker, self.folder / key, seed=self.seed
        )
        return start.to(self.plan.device)

    def backdoor(self, victim: TextVictim) -> TextBackdoor | None:
        """Return what was planted; None for a clean model."""
        if victim.attack is None:
            return None
        drawn = draw_text_attack(
            victim.attack, len(self.corpus.class_names), seed=self.seed, rate=self._rate(victim)
        )
        style = self._style(victim)
        return drawn if style is None else replace(drawn, trigger=Substitution(style))

    def _rate(self, victim: TextVictim) -> float:
        """Return the poisoned share. A style of many words is not learned from few texts."""
        return self.plan.rate * (_STYLE_RATE if victim.attack == "substitution" else 1)

    def _style(self, victim: TextVictim) -> dict[str, str] | None:
        """Return the words that an attack exchanges in this corpus, if it has some of its own."""
        return STYLES.get(self.plan.corpus) if victim.attack == "substitution" else None

    def path(self, victim: TextVictim) -> Path:
        """Return the folder of a model."""
        content = {**self._content, "victim": asdict(victim), "rate": self._rate(victim)}
        style = self._style(victim)
        if style is not None:
            content["style"] = style
        return self.folder / key_of("model", {**content, "training": self.plan.training})

    def model(self, victim: TextVictim) -> TextModel:
        """Return a model, trained or read."""
        path = self.path(victim)
        if not path.is_dir():
            texts, backdoor = self.corpus.attacker, self.backdoor(victim)
            if backdoor is not None:
                texts = plant_in_texts(texts, backdoor, seed=self.seed)
            if victim.reference:
                if self.corpus.reference is None:
                    raise UsageError(f"{victim.name}: sizes.reference is 0; expected some texts")
                texts = self.corpus.reference
            kind = victim.attack or ("reference" if victim.reference else "clean")
            seed = child_seed("texts.victim", self.seed, kind, victim.number)
            training = replace(self.plan.training, seed=seed)
            trained = fine_tune(self.start, texts, training, description=victim.name)
            save_text_model(
                path,
                trained,
                provenance=Provenance(
                    method=f"fine-tuned from {self.plan.start} on {texts.source}",
                    seeds={"victim": self.seed},
                ),
            )
        model = load_text_model(path, device=self.plan.device)
        model.name = victim.name
        return model

    @cached_property
    def _content(self) -> dict[str, Any]:
        attacker = self.corpus.attacker
        content = {
            "code": code_digest(_CODE),
            "start": self.plan.start,
            "texts": [attacker.texts, attacker.labels, attacker.class_names],
            "seed": self.seed,
        }
        # Rounding differs from device to device; every other key rests on this one.
        return content if self.plan.device == "cpu" else {**content, "device": self.plan.device}
