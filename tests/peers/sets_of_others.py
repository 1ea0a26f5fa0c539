"""Write image sets with the libraries that made their formats; what each reads of them as JSON.

python sets_of_others.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Caches go where the test's other files are.
os.environ["HF_HOME"] = str(Path(sys.argv[1]) / "cache")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # beside the tests, not a release

import datasets
import numpy as np
import torch
import webdataset
from PIL import Image

from pydetox.data import (
    ImageSet,
    ImageSource,
    load_class_names,
    load_images,
    load_templates,
)
from pydetox.data.names import fill_templates

FOLDER = Path(sys.argv[1])
NAMES = ["cat", "dog", "owl"]
SIZE, COUNT = 12, 9
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 0, 2, 2, 1, 0]
PICTURES = [Image.fromarray(one) for one in PIXELS]


def judged(found: ImageSet, images: list[Image.Image] | np.ndarray, labels: list[int]) -> dict:
    """Compare an image set with what the other library itself reads."""
    theirs = torch.from_numpy(np.stack([np.array(one) for one in images])).permute(0, 3, 1, 2)
    line = None if found.report is None else found.report.line()
    return {
        "pixels": torch.equal(found.images, theirs),
        "labels": found.labels is not None and found.labels.tolist() == labels,
        "names": list(found.class_names or ()),
        "report": line,
    }


def of_datasets() -> dict[str, object]:
    """Parquet files and objects of the datasets library."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    made = datasets.Dataset.from_dict({"image": PICTURES, "label": LABELS}, features=features)
    (FOLDER / "parquet").mkdir()
    for k in range(2):
        part = made.shard(2, k, contiguous=True)
        part.to_parquet(FOLDER / "parquet" / f"train-{k:05}-of-00002.parquet")
    read = datasets.load_dataset(
        "parquet", data_files=str(FOLDER / "parquet" / "*.parquet"), split="train"
    )
    theirs = [row["image"] for row in read], [row["label"] for row in read]
    split = datasets.DatasetDict({"train": made})
    split.save_to_disk(FOLDER / "saved")
    kept = datasets.load_from_disk(FOLDER / "saved")["train"]
    plain = made.cast_column("image", datasets.Image(decode=False))
    columns = made.rename_columns({"image": "img", "label": "fine_label"})
    return {
        "parquet": judged(load_images(FOLDER / "parquet", image_size=SIZE), *theirs),
        "object": judged(load_images(made, image_size=SIZE), *theirs),
        "from disk": judged(load_images(kept, image_size=SIZE), *theirs),
        "not decoded": judged(load_images(plain, image_size=SIZE), *theirs),
        "other columns": judged(load_images(columns, image_size=SIZE), *theirs),
        "selected": judged(
            load_images(made.select([4, 2]), image_size=SIZE),
            [PICTURES[4], PICTURES[2]],
            [LABELS[4], LABELS[2]],
        ),
    }


def of_webdataset() -> dict[str, object]:
    """Shards of the webdataset package, with numbers or with JSON as labels."""
    (FOLDER / "shards").mkdir()
    pattern = str(FOLDER / "shards" / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for k, picture in enumerate(PICTURES):
            writer.write({"__key__": f"{k:08}", "png": picture, "cls": LABELS[k]})
    (FOLDER / "shards" / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    urls = str(FOLDER / "shards" / "{000000..000001}.tar")
    rows = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    )
    theirs = [row[0] for row in rows], [row[1] for row in rows]
    with webdataset.TarWriter(str(FOLDER / "json.tar")) as writer:
        for k, picture in enumerate(PICTURES):
            label = {"label": LABELS[k], "name": NAMES[LABELS[k]]}
            writer.write({"__key__": f"{k:08}", "jpg": picture, "json": label})
    again = FOLDER / "again.tar"  # names that come again later are samples of their own
    with webdataset.TarWriter(str(again)) as writer:
        for k, picture in enumerate(PICTURES):
            writer.write({"__key__": f"{k % 4}", "png": picture, "cls": LABELS[k]})
    repeated = webdataset.WebDataset(str(again), shardshuffle=False).decode("pil")
    rows = list(repeated.to_tuple("png", "cls"))
    twice = [row[0] for row in rows], [row[1] for row in rows]
    # JPEG loses some of the picture: webdataset's own pixels are the truth.
    plain = webdataset.WebDataset(str(FOLDER / "json.tar"), shardshuffle=False)
    rows = list(plain.decode("pil").to_tuple("jpg", "json"))
    noted = [row[0] for row in rows], [row[1]["label"] for row in rows]
    return {
        "shards": judged(load_images(urls, image_size=SIZE), *theirs),
        "folder of shards": judged(load_images(FOLDER / "shards", image_size=SIZE), *theirs),
        "json": judged(
            load_images(FOLDER / "json.tar", image_size=SIZE, class_names=NAMES), *noted
        ),
        "names again": judged(load_images(again, image_size=SIZE, class_names=NAMES), *twice),
        "digest": len(ImageSource(urls).digest()),
    }


def of_medmnist() -> dict[str, object]:
    """An archive of medmnist, which its own class reads."""
    from medmnist import BloodMNIST
    from medmnist.info import INFO

    side = 28
    images = np.random.default_rng(1).integers(0, 256, (7, side, side, 3), dtype=np.uint8)
    labels = np.array([[k % 8] for k in range(7)], dtype=np.uint8)
    arrays, sizes = {}, {"train": 7, "val": 3, "test": 5}
    INFO["bloodmnist"]["n_samples"] = sizes  # its class compares the archive with them
    for part, last in sizes.items():
        arrays |= {f"{part}_images": images[:last], f"{part}_labels": labels[:last]}
    np.savez_compressed(FOLDER / "bloodmnist.npz", **arrays)
    made = BloodMNIST(split="test", root=str(FOLDER), download=False)
    rows = [made[k] for k in range(len(made))]
    theirs = [row[0] for row in rows], [int(row[1][0]) for row in rows]
    names = list(INFO["bloodmnist"]["label"].values())
    return {
        "archive": judged(
            load_images(FOLDER / "bloodmnist.npz", image_size=side, class_names=names), *theirs
        ),
        "object": judged(load_images(made, image_size=side, class_names=names), *theirs),
    }


def of_clip_benchmark() -> dict[str, object]:
    """All lists of the clip-benchmark package."""
    from clip_benchmark.datasets import builder

    folder = Path(builder.__file__).parent
    names, templates = (
        json.loads((folder / f"en_{kind}.json").read_text(encoding="utf-8"))
        for kind in ("classnames", "zeroshot_classification_templates")
    )
    cupl = json.loads((folder / "cupl_prompts.json").read_text(encoding="utf-8"))
    known = [k for k, v in names.items() if k != "imagenet1k" and isinstance(v, list)]
    wrong = [k for k in known if list(load_class_names(k)) != names[k]]
    wrong += [f"wds/{k}" for k in known if list(load_class_names(f"wds/{k}")) != names[k]]
    shown = {k: v for k, v in templates.items() if k != "imagenet1k"}
    wrong += [k for k, v in shown.items() if list(load_templates(k)) != v]
    for kind, prompts in cupl.items():
        given = load_templates(f"cupl:{kind}")
        wrong += [f"{kind}: {c}" for c, v in prompts.items() if fill_templates(given, c) != v]
    return {"lists": len(known), "templates": len(shown), "cupl": len(cupl), "wrong": wrong[:20]}


if __name__ == "__main__":
    found = {
        "datasets": of_datasets(),
        "webdataset": of_webdataset(),
        "medmnist": of_medmnist(),
        "clip-benchmark": of_clip_benchmark(),
    }
    sys.stdout.write(f"\n{json.dumps(found)}\n")
