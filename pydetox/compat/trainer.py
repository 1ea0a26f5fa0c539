"""A callback for transformers' Trainer that scans the model while it is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..api import scan
from ..data import ImageData, Template
from ..data.load import require_images
from ..detect.configuration import ScanConfig
from ..detect.result import ScanResult
from ..detect.statistics import FINDINGS, Calibration
from ..numbers import require_whole
from ..reporting.documents import scan_document
from ..reporting.serialize import to_json
from ..session import ModelLike

_LOG = logging.getLogger(__name__)


def _callback_of_transformers() -> Any:
    """Return the class that transformers' Trainer expects, or object where it is not installed."""
    try:
        return import_module("transformers").TrainerCallback
    except (ImportError, AttributeError):
        return object  # other trainers may call the methods by the same names


_Base: Any = _callback_of_transformers()


class ScanCallback(_Base):  # type: ignore[misc]
    """Scans the model after every `every` epochs, as a callback of transformers' Trainer.

    The verdict is logged, kept in `results`, and written to `scans.jsonl` in the output folder of
    the training. The model that is trained is not changed, and neither is its state of training.

    Args:
        images: As in `pydetox.scan`.
        every: The number of epochs between scans.
        stop: Whether the training ends when a scan finds a backdoor.
        calibration: As in `pydetox.scan`.
        base: As in `pydetox.scan`.
        references: As in `pydetox.scan`.
        templates: As in `pydetox.scan`.
        class_names: As in `pydetox.scan`.
        config: As in `pydetox.scan`.

    Attributes:
        results: The epoch and the result of each scan.

    Raises:
        UsageError: `every` is no whole number of epochs above 0.
        DataError: The images are a name of no folder or file.
    """

    def __init__(
        self,
        images: ImageData,
        *,
        every: int = 1,
        stop: bool = False,
        calibration: Calibration | None = None,
        base: ModelLike | None = None,
        references: Sequence[ModelLike] | None = None,
        templates: Sequence[Template] | None = None,
        class_names: Sequence[str] | None = None,
        config: ScanConfig | None = None,
    ) -> None:
        require_whole("every", every, 1)
        require_images(images)
        self.results: list[tuple[int, ScanResult]] = []
        self._images, self._every, self._stop = images, every, stop
        self._options: dict[str, Any] = {
            "calibration": calibration,
            "base": base,
            "references": references,
            "templates": templates,
            "class_names": class_names,
            "config": config,
        }

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """Scan `more["model"]` if it is time, and return `control`."""
        epoch = round(float(state.epoch or 0))
        model = more.get("model")
        if model is None or epoch < 1 or epoch % self._every:
            return control
        if not getattr(state, "is_world_process_zero", True):
            return control  # one process scans for all
        # The scan draws its random numbers from streams of its own, and torch's stay as they are.
        with torch.random.fork_rng():
            found = scan(model, self._images, **self._options)
        if self._options["base"] is not None and found.calibration is not None:
            # Later scans compare with the same references.
            self._options |= {"calibration": found.calibration, "references": None}
            if not found.calibration.relative:
                self._options["base"] = None
        self.results.append((epoch, found))
        _LOG.info("epoch %d: %s: %s", epoch, found.verdict.value, found.detection.reason)
        folder = Path(str(getattr(args, "output_dir", None) or "."))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "scans.jsonl").open("a", encoding="utf-8") as file:
            line = {"epoch": epoch, **json.loads(to_json(scan_document(found), indent=None))}
            file.write(f"{json.dumps(line)}\n")
        if self._stop and found.verdict in FINDINGS:
            control.should_training_stop = True
        return control
