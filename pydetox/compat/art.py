"""ART's Neural Cleanse for PyTorch classifiers, numpy in and out.

The original is `art.defences.transformer.poisoning.NeuralCleanse` of
github.com/Trusted-AI/adversarial-robustness-toolbox, which takes Keras classifiers alone. Its
names and arguments are kept; images are [N, C, H, W], as in ART's `PyTorchClassifier`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import ArchitectureError, DataError, UsageError
from ..models.classifiers import last_layer
from ..numbers import require_number, require_whole
from ..progress import track
from ..rng import generator
from .cleanse import (
    CleanseRules,
    FoundMask,
    Outliers,
    cleanse,
    outliers,
)

_LOG = logging.getLogger(__name__)
_KINDS = ("unlearning", "pruning", "filtering")
#: How far pixels may lie beyond [0, 1] by rounding.
_ROUNDING = 1e-4
#: The largest share of the neurons that is pruned.
_MOST_PRUNED = 0.3


class NeuralCleanse:
    """The defence, which makes a classifier with a method `mitigate`.

    Args:
        classifier: A module of torch that maps float32 [N, C, H, W] to logits [N, K], or ART's
            `PyTorchClassifier`.
    """

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier

    def __call__(
        self,
        transformed_classifier: Any | None = None,
        steps: int = 1000,
        init_cost: float = 1e-3,
        norm: int = 2,
        learning_rate: float = 0.1,
        attack_success_threshold: float = 0.99,
        patience: int = 5,
        early_stop: bool = True,
        early_stop_threshold: float = 0.99,
        early_stop_patience: int = 10,
        cost_multiplier: float = 1.5,
        batch_size: int = 32,
        seed: int = 0,
    ) -> CleansedClassifier:
        """Return a classifier that finds and mitigates backdoors.

        Args:
            transformed_classifier: The classifier; default: that of this object.
            steps: The largest number of passes over the images in a search.
            init_cost: The weight of the mask's norm at first.
            norm: 1 or 2.
            learning_rate: Adam's rate on the trigger.
            attack_success_threshold: The share of images that a trigger must send to its class.
            patience: The number of passes in a row that change the weight of the norm.
            early_stop: Whether a search may end early.
            early_stop_threshold: A search makes progress if the norm falls below this share.
            early_stop_patience: The number of passes without progress that end a search.
            cost_multiplier: The factor of the weight of the norm.
            batch_size: The number of images in a batch of a search.
            seed: The seed of first triggers and batches, which ART leaves to numpy.

        Raises:
            UsageError: A value makes no sense.
            ArchitectureError: The classifier is none.
        """
        for what, whole in (
            ("steps", steps),
            ("patience", patience),
            ("early_stop_patience", early_stop_patience),
            ("batch_size", batch_size),
        ):
            require_whole(what, whole, 1)
        require_whole("seed", seed, 0)
        for what, number in (
            ("init_cost", init_cost),
            ("learning_rate", learning_rate),
            ("attack_success_threshold", attack_success_threshold),
        ):
            require_number(what, number)
        rules = CleanseRules(
            epochs=steps,
            learning_rate=learning_rate,
            initial_cost=init_cost,
            success=attack_success_threshold,
            patience=patience,
            cost_multiplier=cost_multiplier,
            early_stop=early_stop,
            early_stop_threshold=early_stop_threshold,
            early_stop_patience=early_stop_patience,
            norm=norm,
            resets="any cost",
            keeps="before",
            without="last",
        )
        given = self.classifier if transformed_classifier is None else transformed_classifier
        return CleansedClassifier(given, rules, batch_size=batch_size, seed=seed)


class CleansedClassifier:
    """A copy of a classifier, with Neural Cleanse's detection and mitigation.

    All images are floats [N, C, H, W] in [0, 1]. Every method raises DataError for others, and
    ArchitectureError for a classifier whose answers are not those of one linear layer, which the
    first images show.

    Attributes:
        model: The copy, which `mitigate` changes.
        top_indices: The neurons that `predict` watches after a mitigation by filtering.
        activation_threshold: Their activations from which an image is abstained from.
    """

    def __init__(self, classifier: Any, rules: CleanseRules, *, batch_size: int, seed: int) -> None:
        module = classifier if isinstance(classifier, nn.Module) else _module_of(classifier)
        self.model = copy.deepcopy(module).eval().float().requires_grad_(False)
        self._seen: tuple[int, ...] | None = None
        self._head: nn.Linear | nn.Conv2d | None = None
        self.rules, self.batch_size, self.seed = rules, batch_size, seed
        self.top_indices: list[int] = []
        self.activation_threshold: NDArray[np.float32] = np.zeros(0, np.float32)

    def predict(self, x: NDArray[Any], batch_size: int = 128) -> NDArray[np.float32]:
        """Return the logits float32 [N, K]; zeros for images that filtering abstains from."""
        require_whole("batch_size", batch_size, 1)
        answers = self._over(self._images(x), self.model, batch_size)
        if not self.top_indices:
            return answers
        activations = self.get_activations(x)[:, self.top_indices]
        answers[np.any(activations > self.activation_threshold, axis=1)] = 0
        return answers

    def get_activations(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return what goes into the last layer, float32 [N, F]."""
        images, head = self._images(x), self._layer
        seen: list[Tensor] = []

        def features(batch: Tensor) -> Tensor:
            handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                self.model(batch)
            finally:
                handle.remove()
            return seen.pop().flatten(1)

        return self._over(images, features, 128)

    def generate_backdoor(
        self, x_val: NDArray[Any], y_val: NDArray[Any], y_target: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mask and pattern float32 [C, H, W] of the smallest trigger into a class.

        y_target: The class, one-hot [K].
        """
        images, wanted = self._images(x_val), np.asarray(y_target).reshape(-1)
        if len(wanted) != self.nb_classes:
            raise DataError(
                f"y_target has {len(wanted)} values; expected one-hot [{self.nb_classes}]"
            )
        (found,) = self._search(images, [int(wanted.argmax())])
        return _arrays(found)

    def outlier_detection(
        self, x_val: NDArray[Any], y_val: NDArray[Any]
    ) -> list[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
        """Return index, mask and pattern of each class with an unusually small mask."""
        found, judged = self.search(x_val)
        return [(c, *_arrays(found[c])) for c in sorted(judged.flagged)]

    def search(self, x_val: NDArray[Any]) -> tuple[list[FoundMask], Outliers]:
        """Return the smallest trigger into every class, and which of them are outliers.

        The norms are sums over all channels, as ART compares them.
        """
        images = self._images(x_val)
        found = self._search(images, list(range(self.nb_classes)))
        judged = outliers([float(one.mask.abs().sum()) for one in found])
        for label in judged.flagged:
            _LOG.warning("Detected potential backdoor in class: %d", label)
        return found, judged

    def backdoor_examples(
        self, x_val: NDArray[Any], y_val: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]:
        """Return clean images of the flagged classes, the same with their trigger, and labels."""
        labels = self._classes(y_val, len(self._images(x_val)))
        clean, stamped, wanted = [], [], []
        for label, mask, pattern in self.outlier_detection(x_val, y_val):
            own = np.asarray(x_val[labels == label], np.float32)
            if len(own) == 0:
                _LOG.warning("No validation data exists for infected class: %d", label)
            clean.append(own)
            stamped.append((1 - mask) * own + mask * pattern)
            wanted.append(np.asarray(y_val)[labels == label])
        if not clean:
            return np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0)
        return np.concatenate(clean), np.concatenate(stamped), np.concatenate(wanted)

    def check_backdoor_effective(
        self, backdoor_data: NDArray[Any], backdoor_labels: NDArray[Any]
    ) -> bool:
        """Return whether any of the images gets another class than its label."""
        images = self._images(backdoor_data)
        labels = self._classes(backdoor_labels, len(images))
        found = self._over(images, self.model, 128).argmax(axis=1)
        return bool((found != labels).any())

    def mitigate(
        self, x_val: NDArray[Any], y_val: NDArray[Any], mitigation_types: Sequence[str]
    ) -> None:
        """Find backdoors and change the model, if there are any.

        Args:
            x_val: Clean images, [N, C, H, W] with values in [0, 1].
            y_val: Their labels, one-hot [N, K] or indices [N].
            mitigation_types: Some of `unlearning` (a pass of training on stamped images with their
                own labels, one image a step), `pruning` (features that tell stamped images are
                silenced, up to 30% of them) and `filtering` (see `predict`).

        Raises:
            UsageError: There is no such mitigation.
            DataError: Images are not such ones, or labels do not fit them or the classes.
        """
        unknown = [kind for kind in mitigation_types if kind not in _KINDS]
        if unknown:
            raise UsageError(f"mitigation {unknown[0]!r}; expected one of {', '.join(_KINDS)}")
        clean, stamped, labels = self.backdoor_examples(x_val, y_val)
        if len(stamped) == 0:
            _LOG.info("No backdoor labels were detected")
            return
        change = self.get_activations(clean) - self.get_activations(stamped)
        ranked = np.argsort(change.sum(axis=0), kind="stable")
        for kind in mitigation_types:
            if kind == "unlearning":
                self._unlearn(stamped, self._classes(labels, len(stamped)))
            elif kind == "pruning":
                for count, index in enumerate(ranked):
                    pruned_enough = count >= _MOST_PRUNED * len(ranked)
                    if pruned_enough or not self.check_backdoor_effective(stamped, labels):
                        break
                    self._silence(int(index))
            else:
                self.top_indices = [int(k) for k in ranked[: math.ceil(len(ranked) * 0.01)]]
                watched = self.get_activations(clean)[:, self.top_indices]
                self.activation_threshold = watched.mean(axis=0) + watched.std(axis=0)

    @property
    def nb_classes(self) -> int:
        """The number of classes K, which is known once the classifier has seen images."""
        layer = self._layer
        return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels

    @property
    def _layer(self) -> nn.Linear | nn.Conv2d:
        if self._head is None:
            raise UsageError("the classifier has seen no images yet; expected predict() first")
        return self._head

    def _images(self, x: NDArray[Any]) -> Tensor:
        """Return images float32 [N, C, H, W]; a new shape of them shows the last layer."""
        array = np.asarray(x)
        if array.ndim != 4 or 0 in array.shape:
            raise DataError(f"images are {list(array.shape)}; expected [N, C, H, W]")
        if array.dtype.kind != "f":
            raise DataError(
                f"images are {array.dtype}; expected floats in [0, 1] (bytes divided by 255)"
            )
        low, high = float(array.min()), float(array.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
            raise DataError(
                f"images have values from {low:.4g} to {high:.4g}; expected [0, 1], before any "
                "normalisation"
            )
        images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        if self._seen != images.shape[1:]:
            self._head = self._last_layer(torch.full((1, *images.shape[1:]), 0.5))
            self._seen = tuple(images.shape[1:])
        return images

    def _last_layer(self, images: Tensor) -> nn.Linear | nn.Conv2d:
        name = type(self.model).__name__
        try:
            layer = self.model.get_submodule(last_layer(self.model, images.to(self._device)))
        except ArchitectureError as error:
            raise ArchitectureError(
                f"a {name} is not searched: {error}; expected a classifier that ends in one"
            ) from None
        except (IndexError, RuntimeError, ValueError) as error:
            shape = list(images.shape[1:])
            hint = " (channels come first)" if shape[2] in (1, 3) else ""
            raise DataError(
                f"a {name} does not take images [N, {', '.join(map(str, shape))}]: "
                f"{' '.join(str(error).split())}; expected [N, C, H, W] as in its training{hint}"
            ) from error
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    def _search(self, images: Tensor, targets: list[int]) -> list[FoundMask]:
        if len(images) < self.batch_size:
            raise DataError(
                f"images are {list(images.shape)}; expected [N, C, H, W] with at least batch_size "
                f"= {self.batch_size} images"
            )
        images = images.to(self._device)
        shape = tuple(images.shape[1:])
        drawn = [generator("compat.art", self.seed, c).random((2, *shape)) for c in targets]
        first = torch.from_numpy(np.stack(drawn)).float().to(self._device)
        masks, patterns = first.unbind(1)

        def epoch(number: int) -> list[Tensor]:
            rng = generator("compat.art-batches", self.seed, number)
            order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
            whole = len(images) // self.batch_size * self.batch_size
            return [images[part] for part in torch.split(order[:whole], self.batch_size)]

        return cleanse(self.model, epoch, masks, patterns, self.rules, targets=targets)

    def _unlearn(self, images: NDArray[Any], labels: NDArray[np.int64]) -> None:
        self.model.requires_grad_(True)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        batch = torch.from_numpy(np.asarray(images, np.float32)).to(self._device)
        wanted = torch.from_numpy(labels).to(self._device)
        try:
            # In evaluation mode: one image has no statistics of its own.
            for one in track(range(len(batch)), "Unlearning"):
                optimizer.zero_grad(set_to_none=True)
                at = slice(one, one + 1)
                loss = cross_entropy(self.model(batch[at]), wanted[at])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        finally:
            self.model.requires_grad_(False)

    def _silence(self, index: int) -> None:
        """Let a feature have no part in the answers."""
        with torch.no_grad():
            self._layer.weight[:, index] = 0

    def _classes(self, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
        values = np.asarray(labels)
        if values.ndim == 2 and values.shape[1] == self.nb_classes and values.dtype.kind in "biuf":
            values = np.where(np.isnan(values).any(axis=1), -1, values.argmax(axis=1))
        if values.shape != (count,) or values.dtype.kind not in "iuf":
            raise DataError(
                f"labels are {values.dtype} {list(np.shape(labels))}; expected numbers "
                f"[{count}, {self.nb_classes}] or [{count}]"
            )
        whole = np.isfinite(values) & (values == np.floor(values))
        wrong = values[~(whole & (values >= 0) & (values < self.nb_classes))]
        if len(wrong):
            raise DataError(
                f"labels: {len(wrong)} of {count} are no class, such as {wrong[0]}; expected "
                f"0..{self.nb_classes - 1}"
            )
        return values.astype(np.int64)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _over(
        self, images: Tensor, function: Callable[[Tensor], Tensor], batch_size: int
    ) -> NDArray[np.float32]:
        parts = [function(part.to(self._device)).cpu() for part in torch.split(images, batch_size)]
        return torch.cat(parts).float().numpy()


def _module_of(classifier: Any) -> nn.Module:
    """Return the module of ART's `PyTorchClassifier`."""
    module = getattr(classifier, "model", None)
    module = getattr(module, "_model", module)
    if not isinstance(module, nn.Module):
        raise ArchitectureError(
            f"a {type(classifier).__name__} is no classifier that can be searched; expected a "
            "module of torch or ART's PyTorchClassifier"
        )
    return module


def _arrays(found: FoundMask) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return found.mask.cpu().numpy(), found.pattern.cpu().numpy()
