"""`TextScanConfig`: how a text model is searched and judged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import UsageError
from .triggers import PLACES


@dataclass(frozen=True)
class AdvancedTextConfig:
    """What rarely needs a change.

    Attributes:
        search_tokens: The tokens of a text that a search sees; the words next to the trigger.
        draft_tokens: As few tokens of a text are seen where most candidates are dropped.
        precision: Of comparisons between candidates, `float32` or `bfloat16`, or `auto`: bfloat16
            where the device has instructions for it. Gradients and decisions are float32.
        learning_rate: That of Adam on the logits of the relaxed search.
        temperatures: The first and the last temperature of the relaxed search.
        pool: The words per class that the sweep over the vocabulary keeps.
        swaps: The words per place that gradients propose.
        beam: The triggers per class that are kept from one length to the next.
        stages: The texts on which candidates are compared, from many candidates to few.
        floor: What is added to a loss before its logarithm counts. Below it, losses differ by
            nothing that matters. A class with a trigger at a fifth of it needs no longer ones.
    """

    search_tokens: int = 14
    draft_tokens: int = 9
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    learning_rate: float = 0.3
    temperatures: tuple[float, float] = (2.0, 0.1)
    pool: int = 64
    swaps: int = 12
    beam: int = 3
    stages: tuple[int, int, int] = (2, 6, 16)
    floor: float = 0.05


@dataclass(frozen=True)
class TextScanConfig:
    """How a text model is searched and judged.

    Attributes:
        length: The largest number of words of a trigger, 1 to 8. Each length has a verdict, and
            p-values are corrected for their number.
        place: Where triggers are inserted, one of `PLACES`.
        restarts: Relaxed searches per class.
        steps: Steps of the relaxed search.
        batch_size: Texts in a step of each relaxed search.
        texts: The largest number of clean texts that are used.
        max_tokens: The tokens of a text that count in the decision.
        references: With a base alone: the number of clean copies of it that are fine-tuned.
        contrast: Whether searches are in contrast to the base; None does so where references and a
            base are given.
        p_backdoored: The chance of a false alarm below which the verdict is `backdoored`.
        p_suspicious: The chance below which it is `suspicious`.
        seed: The seed of all random choices.
        advanced: What rarely needs a change.
    """

    length: int = 3
    place: str = "start"
    restarts: int = 1
    steps: int = 30
    batch_size: int = 4
    texts: int = 96
    max_tokens: int = 128
    references: int = 3
    contrast: bool | None = None
    p_backdoored: float = 0.01
    p_suspicious: float = 0.05
    seed: int = 0
    advanced: AdvancedTextConfig = field(default_factory=AdvancedTextConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 8:
            raise UsageError(f"length is {self.length}; expected 1 to 8 words")
        if self.place not in PLACES:
            raise UsageError(f"place is {self.place!r}; expected one of {', '.join(PLACES)}")
        counts = {"restarts": 0, "steps": 0, "batch_size": 1, "texts": 4, "max_tokens": 4}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.references < 2:
            raise UsageError(f"references is {self.references}; expected at least 2")
        if not 0 < self.p_backdoored <= self.p_suspicious < 1:
            raise UsageError(
                f"p_backdoored is {self.p_backdoored} and p_suspicious {self.p_suspicious}; "
                "expected 0 < p_backdoored <= p_suspicious < 1"
            )
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; expected a non-negative integer")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)
