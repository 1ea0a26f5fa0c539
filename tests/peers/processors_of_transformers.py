"""Run with transformers on the path: what AutoImageProcessor makes of processor files.

python processors_of_transformers.py FOLDER

FOLDER/cases.json has a list of [processor file, model_type, whether all pictures are of interest or
the first alone]. FOLDER/pictures.npz has pictures.
The pixels of case K go to FOLDER/K.npz, and FOLDER/errors.json says which cases it refuses.
FOLDER/defaults.json gets what each class does where its file is silent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from transformers import AutoImageProcessor

CLASSES = ("CLIP", "ChineseCLIP", "Bit", "Blip", "Siglip", "Siglip2", "ViT", "DeiT", "ConvNext")


def main(folder: Path) -> None:
    pictures = {k: Image.fromarray(v) for k, v in np.load(folder / "pictures.npz").items()}
    errors = {}
    cases = json.loads((folder / "cases.json").read_text())
    for index, (content, model_type, whole) in enumerate(cases):
        place = folder / str(index)
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"model_type": model_type}))
        (place / "preprocessor_config.json").write_text(json.dumps(content))
        try:
            processor = AutoImageProcessor.from_pretrained(place)
            made = {
                name: processor(picture, return_tensors="np")["pixel_values"][0]
                for name, picture in list(pictures.items())[: None if whole else 1]
            }
        except Exception as error:  # noqa: BLE001
            errors[index] = f"{type(error).__name__}: {error}"
            continue
        np.savez(folder / f"{index}.npz", **made)
    (folder / "errors.json").write_text(json.dumps(errors))
    (folder / "defaults.json").write_text(json.dumps(defaults()))


def defaults() -> dict[str, dict[str, object]]:
    result = {}
    for name in (*CLASSES, "EfficientNet"):
        cls = getattr(transformers, f"{name}ImageProcessor")
        keys = {key for base in cls.__mro__ for key in vars(base)}
        plain = {key: getattr(cls, key) for key in keys if not key.startswith("_")}
        result[cls.__name__] = {
            key: value
            for key, value in plain.items()
            if isinstance(value, bool | int | float | list | tuple | dict)
        }
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
