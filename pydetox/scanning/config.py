"""The configuration of a scan of many checkpoints, as one frozen object."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError

if TYPE_CHECKING:
    from ..data import ImageSource
    from ..detect.configuration import ScanConfig

EngineName = Literal["auto", "inline", "local", "ray"]

#: The attributes that describe how a run is carried out. They do not influence its results.
EXECUTION = (
    "engine",
    "workers",
    "threads",
    "address",
    "timeout",
    "max_size",
    "max_memory",
    "shard",
    "offline",
    "retry_errors",
)


#: The epochs of the fine-tuning of references with a given learning rate.
DEFAULT_REFERENCE_EPOCHS = 3


@dataclass(frozen=True)
class ScannerConfig:
    """How checkpoints are scanned. The attributes have the names of the options of `pydetox scan`.

    These attributes decide the results:

    Attributes:
        images: Clean images, as `load_images` takes them.
        class_names: A file with class names or the name of a list, as in `load_class_names`; None
            for the names of the images.
        templates: A file with prompts or the name of a list, as in `load_templates`; None for
            built-in prompts.
        max_images: Use a random sample of that many images; None for all.
        resize: Scale .npz images of another size.
        strict: Refuse images of which something is left out that could have been meant.
        model: The architecture of checkpoints that do not name it.
        weights_key: The set of weights that is meant in pickled targets with several (see
            `load_checkpoint`). Targets without it, and safetensors files, become an `error`.
        image_mean, image_std: The mean and the standard deviation of the images' channels, one
            number or three. They override what suspects and reference models say, and count for
            the base if it says nothing. None takes what the checkpoints say.
        interpolation, resize_mode: How images are scaled. The same rule holds.
        base_model: The architecture of the base if it does not name its own; None for `model`.
        base: A clean model to calibrate with and to take weight differences to.
        reference_models: Clean models to calibrate with, made as the suspects were, at least 2,
            instead of copies of `base`. With `base`, triggers are searched in contrast to it (see
            `ScanConfig.contrast`).
        calibration: A calibration file, instead of one made here. One that was made in contrast to
            a base needs that base.
        references: Clean models of a calibration made from `base`, at least 2, of each distance.
        reference_learning_rate, reference_epochs: Their fine-tuning, over 3 epochs without a
            number. Without a learning rate, they are fine-tuned until they have moved about as far
            from `base` as the suspects (see `detect.interpolation`).
        before: The model before its repair, if the targets are repairs of one model. A class then
            counts only if it stands out in both (see `detect.rescan.scan_after_repair`).
        known_vectors: Weight differences in .safetensors files, such as trigger vectors of known
            attacks: each checkpoint's difference to `base` is compared with them.
        inversion: Reconstruct triggers. Without it the weights are only read, checked and compared,
            and every verdict is `inconclusive`.
        objective, families, steps, batch_size, precision, restarts, seed: The search, as in
            `ScanConfig`.
        positive_control: Whether to plant a patch in a copy of each clean model, and to scan the
            copy (see `detect.control`).
        keep_all: Whether to search all classes to the end, including those that can no longer be
            the outlier.
        device: `cpu`, `cuda` for all GPUs, or `cuda:1` for one.

    These attributes decide how the results are computed:

    Attributes:
        engine: `local` for processes on this machine, `ray` for a Ray cluster, or `inline` for this
            process. `auto` is `inline` for a single checkpoint without a timeout, else `local`.
        workers: The number of workers; None for one per GPU or per four CPU cores. With the local
            engine, more workers than GPUs share the GPUs, and each gets an equal part of the
            memory.
        threads: The number of CPU threads of each worker; None to share the cores evenly.
        address: The address of the Ray cluster; None to start one on this machine.
        timeout: The seconds that the survey and the scan of a checkpoint may take, each; None for
            no limit.
        max_size: The largest size, in bytes, of a checkpoint's weights files together. Larger
            checkpoints are skipped. None for no limit.
        max_memory: The bytes that a worker may need. Checkpoints that need more are skipped (see
            `memory.Limits`). None for no limit. The need is estimated; the processes get no limit.
        shard: (i, n) to scan the i-th of n parts of the targets, with i in 1..n.
        offline: Whether to use only files on this machine.
        retry_errors: Whether to scan checkpoints again that ended in an error in an earlier run.

    Raises:
        UsageError: A value is out of range.
    """

    images: str
    class_names: str | None = None
    templates: str | None = None
    max_images: int | None = None
    resize: bool = False
    strict: bool = False
    model: str | None = None
    weights_key: str | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    interpolation: str | None = None
    resize_mode: str | None = None
    base_model: str | None = None
    base: str | None = None
    reference_models: tuple[str, ...] = ()
    calibration: str | None = None
    references: int = 3
    reference_epochs: int | None = None
    reference_learning_rate: float | None = None
    before: str | None = None
    known_vectors: tuple[str, ...] = ()
    inversion: bool = True
    objective: Literal["targeted", "label-free"] = "targeted"
    families: tuple[Literal["patch", "blend"], ...] = ("patch", "blend")
    steps: int = 150
    batch_size: int = 16
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    restarts: int = 1
    positive_control: bool = False
    keep_all: bool = False
    seed: int = 0
    device: str = "cpu"
    engine: EngineName = "auto"
    workers: int | None = None
    threads: int | None = None
    address: str | None = None
    timeout: float | None = None
    max_size: int | None = None
    max_memory: int | None = None
    shard: tuple[int, int] | None = None
    offline: bool = False
    retry_errors: bool = False

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is(value, kind):
                raise UsageError(f"{name} is {value!r}; expected {_shown(kind)}")
        for name in ("max_images", "steps", "batch_size", "restarts", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        for name in ("timeout", "max_size", "max_memory", "reference_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}; expected more than 0")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(f"shard {self.shard[0]}/{self.shard[1]}; expected 1/n to n/n")
        if self.reference_epochs is not None and self.reference_learning_rate is None:
            raise UsageError(
                "a number of reference epochs without a learning rate (reference_learning_rate=): "
                "without it, references are fine-tuned until they have moved as far as the suspects"
            )
        if self.reference_models and self.calibration is not None:
            raise UsageError("reference models and a calibration file exclude each other")
        if len(self.reference_models) == 1:
            raise UsageError("one reference model; a calibration needs at least 2")
        if not self.families or len(set(self.families)) < len(self.families):
            raise UsageError(f"families {list(self.families)}; expected at least one, each once")
        if self.known_vectors and self.base is None:
            raise UsageError("known vectors need a base, to which the differences are taken")
        if self.before is not None and not self.inversion:
            raise UsageError("a model before its repair (before=), and no search for triggers")
        if self.address is not None and self.engine != "ray":
            raise UsageError(
                f"an address of a Ray cluster, but the engine is {self.engine}; expected ray"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ScannerConfig:
        """Read back what `to_dict` returned; UsageError for unknown names and wrong types."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise UsageError(
                f"configuration: {unknown[0]!r} is not among {', '.join(sorted(known))}"
            )
        if "images" not in content:
            raise UsageError("configuration: images is missing")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content.items()
        }
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScannerConfig:
        """Read a JSON or YAML file whose keys are names of attributes; UsageError otherwise."""
        return cls.from_dict(read_config_file(path))

    def absolute(self) -> ScannerConfig:
        """Return the configuration with absolute paths, for workers that run elsewhere."""
        changes: dict[str, Any] = {
            # Class names and templates may be names of lists, which are the same everywhere.
            name: _absolute(getattr(self, name))
            for name in ("class_names", "templates", "calibration")
            if getattr(self, name) is not None
        }
        from ..data import locate_images  # with torch, which options do not need

        source, path = locate_images(self.images)
        if path is not None:
            changes["images"] = f"{source}={path.absolute()}" if source else str(path.absolute())
        for name in ("base", "model", "base_model", "before"):
            given = getattr(self, name)
            if given is not None:
                changes[name] = _absolute(given)
        changes["reference_models"] = tuple(map(_absolute, self.reference_models))
        changes["known_vectors"] = tuple(str(Path(v).absolute()) for v in self.known_vectors)
        return dataclasses.replace(self, **changes)

    def preprocess(self) -> dict[str, Any]:
        """Return what is said about preparing images, as open_clip's ``preprocess_cfg`` has it."""
        given = {
            "mean": None if self.image_mean is None else list(self.image_mean),
            "std": None if self.image_std is None else list(self.image_std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
        }
        return {key: value for key, value in given.items() if value is not None}

    def results_part(self) -> dict[str, Any]:
        """Return the attributes that decide the results, as plain data."""
        content = {k: v for k, v in self.to_dict().items() if k not in EXECUTION}
        content["device"] = self.device.partition(":")[0]
        return content

    def digest(self, contents: Mapping[str, str]) -> str:
        """Return a SHA-256 of everything that decides the results.

        contents: The digests of the files that attributes name, by attribute. Equal digests mean
        equal results, wherever the files are.
        """
        content = {**self.results_part(), **contents}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def image_source(self) -> ImageSource:
        """Return the source of the images; DataError for class names or prompts without sense.

        A scan uses no labels. Without labels, references are fine-tuned to the base's predictions.
        """
        from ..data import ImageSource

        return ImageSource(
            self.images,
            class_names=self.class_names,
            templates=self.templates,
            max_images=self.max_images,
            resize=self.resize,
            seed=self.seed,
            labels_required=False,
            strict=self.strict,
        )

    @property
    def matches_references(self) -> bool:
        """Whether the run makes references that move as far from the base as the suspects."""
        own = self.makes_calibration and not self.reference_models
        return own and self.reference_learning_rate is None

    @property
    def makes_calibration(self) -> bool:
        """Whether the run makes a calibration instead of reading one."""
        given = self.base is not None or bool(self.reference_models)
        return given and self.calibration is None

    def scan_config(self) -> ScanConfig:
        """Return the configuration of a single scan.

        The references decide whether it is in contrast to the base (see `ReferencePlan`).
        """
        from ..detect.configuration import ScanConfig
        from ..inversion import InversionConfig
        from ..training import TrainConfig

        training = None
        if self.reference_learning_rate is not None:
            training = TrainConfig(
                epochs=self.reference_epochs or DEFAULT_REFERENCE_EPOCHS,
                learning_rate=self.reference_learning_rate,
            )
        config = ScanConfig(
            objective=self.objective,
            families=self.families,
            inversion=InversionConfig(
                steps=self.steps, batch_size=self.batch_size, precision=self.precision
            ),
            restarts=self.restarts,
            positive_control=self.positive_control,
            references=self.references,
            reference_training=training,
            seed=self.seed,
        )
        return config.every_class() if self.keep_all else config


def _absolute(reference: str) -> str:
    """Return a reference to a checkpoint, absolute if it is a path of this machine."""
    return str(Path(reference).absolute()) if Path(reference).exists() else reference


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the object of a JSON or, by its ending, YAML file.

    Raises UsageError, which names the file, for anything else.
    """
    name = os.fspath(path)
    is_yaml = Path(path).suffix.lower() in (".yaml", ".yml")
    kind = "YAML" if is_yaml else "JSON"
    try:
        text = Path(path).read_text(encoding="utf-8")
        if is_yaml:
            content = _read_yaml(text)
        else:
            from ..reporting.serialize import unique_keys  # with torch

            content = json.loads(text, object_pairs_hook=unique_keys)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: cannot be read as {kind} ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{name}: expected one {kind} object, such as max_images: 500")
    return content


def _read_yaml(text: str) -> Any:
    """Return what a YAML text holds; ValueError, with one short reason, for a wrong one.

    A key that is there twice is wrong; PyYAML would take the last one.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key.value!r} is there twice", key.start_mark
                        )
                    seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(str(error).splitlines()[0]) from error


def _is(value: object, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_is(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(map(_is, value, arguments))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _shown(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)).replace("typing.", "").replace("NoneType", "None")
