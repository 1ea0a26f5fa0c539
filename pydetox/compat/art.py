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
from ..progress import track
from ..rng import generator
from .cleanse import CleanseRules, FoundMask, Outliers, cleanse, outliers

_LOG = logging.getLogger(__name__)
_KINDS = ("unlearning", "pruning", "filtering")
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
        """
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

    Attributes:
        model: The copy, which `mitigate` changes.
        top_indices: The neurons that `predict` watches after a mitigation by filtering.
        activation_threshold: Their activations from which an image is abstained from.
    """

    def __init__(self, classifier: Any, rules: CleanseRules, *, batch_size: int, seed: int) -> None:
        module = classifier if isinstance(classifier, nn.Module) else _module_of(classifier)
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; expected at least 1")
        self.model = copy.deepcopy(module).eval().float().requires_grad_(False)
        self._last = last_layer(self.model)
        self._head = self.model.get_submodule(self._last)
        assert isinstance(self._head, nn.Linear)
        self.nb_classes = self._head.out_features
        self.rules, self.batch_size, self.seed = rules, batch_size, seed
        self.top_indices: list[int] = []
        self.activation_threshold: NDArray[np.float32] = np.zeros(0, np.float32)

    def predict(self, x: NDArray[Any], batch_size: int = 128) -> NDArray[np.float32]:
        """Return the logits float32 [N, K]; zeros for images that filtering abstains from."""
        answers = self._over(x, self.model, batch_size)
        if not self.top_indices:
            return answers
        activations = self.get_activations(x)[:, self.top_indices]
        answers[np.any(activations > self.activation_threshold, axis=1)] = 0
        return answers

    def get_activations(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return what goes into the last layer, float32 [N, F]."""
        seen: list[Tensor] = []

        def features(batch: Tensor) -> Tensor:
            handle = self._head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                self.model(batch)
            finally:
                handle.remove()
            return seen.pop()

        return self._over(x, features, 128)

    def generate_backdoor(
        self, x_val: NDArray[Any], y_val: NDArray[Any], y_target: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mask and pattern float32 [C, H, W] of the smallest trigger into a class.

        y_target: The class, one-hot [K].
        """
        (found,) = self._search(x_val, [int(np.argmax(y_target))])
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
        found = self._search(x_val, list(range(self.nb_classes)))
        judged = outliers([float(one.mask.abs().sum()) for one in found])
        for label in judged.flagged:
            _LOG.warning("Detected potential backdoor in class: %d", label)
        return found, judged

    def backdoor_examples(
        self, x_val: NDArray[Any], y_val: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]:
        """Return clean images of the flagged classes, the same with their trigger, and labels."""
        labels = self._classes(y_val, len(x_val))
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
        labels = self._classes(backdoor_labels, len(backdoor_data))
        found = self._over(backdoor_data, self.model, 128).argmax(axis=1)
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
            DataError: Images and labels do not fit.
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

    def _search(self, x_val: NDArray[Any], targets: list[int]) -> list[FoundMask]:
        images = torch.from_numpy(np.ascontiguousarray(x_val, dtype=np.float32))
        if images.ndim != 4 or len(images) < self.batch_size:
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
        assert isinstance(self._head, nn.Linear)
        with torch.no_grad():
            self._head.weight[:, index] = 0

    def _classes(self, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
        values = np.asarray(labels)
        if values.ndim == 2 and values.shape[1] == self.nb_classes:
            values = values.argmax(axis=1)
        if values.shape != (count,):
            raise DataError(
                f"labels are {list(np.shape(labels))}; expected [{count}, {self.nb_classes}] or "
                f"[{count}]"
            )
        return values.astype(np.int64)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _over(
        self, x: NDArray[Any], function: Callable[[Tensor], Tensor], batch_size: int
    ) -> NDArray[np.float32]:
        images = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
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
