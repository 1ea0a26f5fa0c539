"""The configuration of a benchmark: every number that decides a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...detect.configuration import ScanConfig
from ...errors import UsageError
from ...inversion import InversionConfig
from ...training import TrainConfig
from ..attacks import ATTACKS
from ..demo import MINI_CLIP

#: Poisoned share of the fine-tuning set, for each backdoor, by attack: 2% where that plants it in
#: models of this size, else more, up to 5%; chosen on models of the tuning seed alone.
RATES: dict[str, float] = dict.fromkeys(ATTACKS, 0.05) | {
    "badnets": 0.02,
    "blended": 0.02,
    "sig": 0.02,
    "triangles": 0.03,
    "text": 0.02,
    "badclip": 0.03,
    "two-backdoors": 0.02,
}

#: Passes over the fine-tuning set where they are more than `Plan.fine_tuning` has: these attacks
#: are learned late. Chosen like the rates.
EPOCHS: dict[str, int] = {
    "badnets-random-pattern": 10,
    "clean-label": 10,
}


@dataclass(frozen=True)
class Plan:
    """The whole configuration of a run.

    Attributes:
        data: Image source of `load_images`; fashion-mnist brings its own test part.
        attacker, defender, validation, test: Images in each part (see `data.Splits`).
        fine_tuning_images: The number of the attacker's images that suspects are fine-tuned on.
        attacks: Names (`attacks.ATTACKS`).
        rates: Poisoned share of the fine-tuning set, for each backdoor, by attack.
        epochs: Passes over it, for attacks that need more than `fine_tuning` has.
        seeds: One base model, one set of victims and clean models, one calibration per seed. Not
            those from 0 to 5: the methods were developed while their results were seen.
        clean_models: Clean fine-tunes per seed.
        reference_models: Clean fine-tunes per seed that the defender has for calibration: of the
            same base, each on images drawn anew, never measured. At least 2.
        tuning_seed: A further seed, whose models serve to choose settings and for nothing else.
        tuning_attacks: The attacks of those models.
        model_config: open_clip's ``model_cfg`` of all models.
        base_training, fine_tuning: The training of the base and of every suspect.
        scan: How the defender scans; its seed is replaced by that of the models.
        least_planted: A victim counts when each of its triggers succeeds at least so often on
            validation images before any defence.
        least_ca_kept: In tuning, a setting must keep this share of CA before its ASR counts.
        xi_points: Coefficients from -2 to 2 in each direction of the maps of xi.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    data: str = "fashion-mnist"
    attacker: int = 20_000
    defender: int = 1_000
    validation: int = 1_000
    test: int = 2_000
    fine_tuning_images: int = 12_000
    attacks: tuple[str, ...] = ATTACKS
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    epochs: Mapping[str, int] = field(default_factory=lambda: EPOCHS)
    seeds: tuple[int, ...] = (6, 7, 8)
    clean_models: int = 7
    reference_models: int = 4
    tuning_seed: int = 100
    tuning_attacks: tuple[str, ...] = ("badnets", "blended")
    model_config: dict[str, Any] = field(default_factory=lambda: MINI_CLIP)
    base_training: TrainConfig = field(
        default_factory=lambda: TrainConfig(10, 1e-3, batch_size=64, train_text=True)
    )
    fine_tuning: TrainConfig = field(default_factory=lambda: TrainConfig(5, 1e-3, batch_size=64))
    scan: ScanConfig = field(
        default_factory=lambda: ScanConfig(
            inversion=InversionConfig(steps=150, success_threshold=0.9, precision="bfloat16"),
            contrast=True,
            p_backdoored=0.005,
            p_suspicious=0.02,
            drop_below=0.0,
        )
    )
    least_planted: float = 0.5
    least_ca_kept: float = 0.97
    xi_points: int = 9
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.attacks) | set(self.tuning_attacks)) if self.attacks else []
        wrong = [name for name in unknown if name not in ATTACKS]
        if wrong or not self.attacks or not self.seeds:
            raise UsageError(
                f"attacks {list(self.attacks)}, seeds {list(self.seeds)}; expected at least one "
                f"seed and some of {', '.join(ATTACKS)}"
            )
        if self.tuning_seed in self.seeds:
            raise UsageError(
                f"seed {self.tuning_seed} is kept for tuning; its models cannot be measured too"
            )
        if self.clean_models < 1 or min(self.reference_models, self.xi_points) < 2:
            raise UsageError(
                f"clean_models {self.clean_models}, reference_models {self.reference_models}, "
                f"xi_points {self.xi_points}; expected at least 1, 2 and 2"
            )

    def rate(self, attack: str) -> float:
        """Return the poisoned share of the fine-tuning set for each backdoor of an attack."""
        return self.rates[attack]

    def training(self, attack: str | None) -> TrainConfig:
        """Return how a victim, or a clean model (None), is fine-tuned."""
        more = None if attack is None else self.epochs.get(attack)
        return self.fine_tuning if more is None else replace(self.fine_tuning, epochs=more)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def quick_plan(data: str = "fashion-mnist") -> Plan:
    """Return a run of minutes, that shows that everything works, not how well."""
    few = data == "digits"  # 1,797 images in all: more passes over them
    return Plan(
        data=data,
        attacker=3_000,
        defender=250,
        validation=150,
        test=400,
        fine_tuning_images=2_000,
        attacks=("badnets", "blended"),
        rates=dict.fromkeys(ATTACKS, 0.1),
        epochs={},
        seeds=(0,),
        clean_models=2,
        reference_models=2,
        tuning_attacks=(),
        base_training=TrainConfig(20 if few else 5, 1e-3, batch_size=64, train_text=True),
        fine_tuning=TrainConfig(12 if few else 5, 1e-3, batch_size=64),
        scan=ScanConfig(
            inversion=InversionConfig(steps=60, success_threshold=0.9, precision="bfloat16"),
            contrast=True,
            # Two references of short searches: only what stands far out is worth a repair, and a
            # round of repairs takes a minute.
            p_backdoored=0.0005,
            p_suspicious=0.001,
        ),
        xi_points=5,
    )
