"""Tables, shards, parquet files and sets of torchvision, as image sets; names of lists."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pydetox.data import ImageSource, Resizing, load_class_names, load_images, load_templates
from pydetox.data.names import fill_templates
from pydetox.data.shards import shards_of
from pydetox.errors import DataError
from tests.data.test_objects import SIZE, expected, pixels, png

NAMES = ("cat", "dog", "owl")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "pics").mkdir()
    paths = [tmp_path / "pics" / f"{k}.png" for k in range(6)]
    for path, image in zip(paths, pixels(), strict=True):
        path.write_bytes(png(image))
    return paths


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_a_table_as_open_clip_trains_on(tmp_path: Path, files: list[Path], separator: str) -> None:
    titles = [NAMES[k % 3] for k in range(6)]
    rows = [f"pics/{p.name}{separator}{t}" for p, t in zip(files, titles, strict=True)]
    table = write(tmp_path / "train.csv", [f"filepath{separator}title", *rows])
    found = load_images(table, image_size=SIZE)
    assert torch.equal(found.images, expected(pixels()))
    assert found.class_names == NAMES
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    few = load_images(table, image_size=SIZE, max_images=3, class_names=NAMES[::-1])
    assert few.labels is not None
    assert sorted(few.labels.tolist()) == [0, 1, 2]


def test_numbers_and_captions_in_a_table(tmp_path: Path, files: list[Path]) -> None:
    rows = [f"{p},{k % 3}" for k, p in enumerate(files)]
    table = write(tmp_path / "a.csv", ["path,label", *rows])
    found = load_images(table, image_size=SIZE, class_names=NAMES)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    rows = [f'{p},"a photo, number {k}"' for k, p in enumerate(files)]
    table = write(tmp_path / "b.csv", ["filepath,title", *rows])
    found = load_images(table, image_size=SIZE, class_names=NAMES)
    assert found.labels is None
    assert found.class_names == NAMES
    assert found.report is not None
    assert "6 captions for 6 images" in str(found.report.line())


def test_tables_with_faults(tmp_path: Path, files: list[Path]) -> None:
    table = write(tmp_path / "a.csv", ["path,label", "pics/0.png,cat", "pics/none.png,cat"])
    found = load_images(table, image_size=SIZE)
    assert len(found) == 1
    assert found.report is not None
    assert "1 cannot be read (pics/none.png)" in str(found.report.line())
    with pytest.raises(DataError, match=r"pics/none\.png: no such file"):
        load_images(table, image_size=SIZE, strict=True)
    for lines, message in (
        (["a,b", "1,2"], "the columns 'a', 'b'; expected one with the paths"),
        (["path,label", "x.png"], "row 2: 1 columns; expected 2"),
        (["path,label"], "zero images"),
        (["path,label", "x\0.png,cat"], "null characters"),
    ):
        with pytest.raises(DataError, match=message):
            load_images(write(tmp_path / "b.csv", lines), image_size=SIZE)


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (["0.0", "1.0", "2.0"], None, ([0, 1, 2], None)),
        (["0", "", "2"], None, r"1 of 3 images have no label \(pics/1\.png\)"),
        (["cat", "nan", "dog"], None, r"1 of 3 images have no label \(pics/1\.png\)"),
        (["cat", "None", "dog"], None, "None, NA and null count as none, unless class_names="),
        (["cat", "nan", "dog"], ("nan", "cat", "dog"), ([1, 0, 2], ("nan", "cat", "dog"))),
        (["", "", ""], None, (None, None)),
        (["-1", "-1", "-1"], None, (None, None)),
        (["0", "-1", "1"], None, r"a\.csv: label -1; expected class indices from 0"),
        (["0.5", "1", "2"], None, r"a\.csv: label '0\.5'; expected whole numbers"),
        (["0.5", "1", "2"], ("1", "0.5", "2"), ([1, 0, 2], ("1", "0.5", "2"))),
        ([' "a b"', ' "a, c"', " d"], None, ([0, 1, 2], ("a b", "a, c", "d"))),
        (["0", "1", "3"], NAMES, r"a\.csv: label 3, but there are only 3 class names"),
        (["1", "0", "1"], ("1", "0"), ([0, 1, 0], ("1", "0"))),
    ],
)
def test_labels_in_a_table(
    tmp_path: Path, files: list[Path], labels: list[str], names: Any, found: Any
) -> None:
    rows = [f"pics/{k}.png,{label}" for k, label in enumerate(labels)]
    table = write(tmp_path / "a.csv", ["path,label", *rows])
    if isinstance(found, str):
        with pytest.raises(DataError, match=found):
            load_images(table, image_size=SIZE, class_names=names)
        return
    read = load_images(table, image_size=SIZE, class_names=names)
    assert (None if read.labels is None else read.labels.tolist()) == found[0]
    assert read.class_names == found[1]


def test_parts_and_lines_in_a_table(tmp_path: Path, files: list[Path]) -> None:
    rows = [f"{p},{k % 3},{'Train' if k < 3 else 'test'}" for k, p in enumerate(files)]
    with pytest.raises(DataError, match=r"a\.csv, column 'split': .* \(test, train\), not one set"):
        load_images(write(tmp_path / "a.csv", ["path,label,split", *rows]), image_size=SIZE)
    found = load_images(write(tmp_path / "a.csv", ["path,label,split", *rows[:3]]), image_size=SIZE)
    assert len(found) == 3
    rows = [f'{p},"of two\nlines"' for p in files]
    found = load_images(write(tmp_path / "a.csv", ["path,label", *rows]), image_size=SIZE)
    assert found.class_names == ("of two\nlines",)


def add(archive: tarfile.TarFile, name: str, data: bytes, **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in changes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def shard(path: Path, first: int = 0, count: int = 6) -> Path:
    with tarfile.open(path, "w") as archive:
        for k in range(first, first + count):
            add(archive, f"{k:06}.cls", str(k % 3).encode())
            add(archive, f"{k:06}.png", png(pixels(12)[k]))
    return path


def test_shards_of_web_dataset(tmp_path: Path) -> None:
    for k in range(2):
        shard(tmp_path / f"{k}.tar", 6 * k)
    write(tmp_path / "classnames.txt", list(NAMES))
    pattern = str(tmp_path / "{0..1}.tar")
    for spec in (pattern, tmp_path, str(tmp_path / "*.tar")):
        found = load_images(spec, image_size=SIZE)
        assert torch.equal(found.images, expected(pixels(12)))
        assert found.class_names == NAMES
        assert found.labels is not None
        assert found.labels.tolist() == [k % 3 for k in range(12)]
    with pytest.raises(DataError, match=r"2\.tar: no such shard"):
        shards_of(str(tmp_path / "{0..2}.tar"))
    source = ImageSource(pattern)
    assert torch.equal(source.read(Resizing(SIZE)).images, found.images)
    before = source.digest()
    shard(tmp_path / "1.tar", 5)
    assert ImageSource(pattern).digest() != before


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["0", "2.0", "1"], [0, 2, 1]),
        (["-1", "-1", "-1"], None),
        (["", "", ""], None),
        (["0", "", "1"], r"1 of 3 images have no label \(1\)"),
        (["a", "nan", "b"], r"1 of 3 images have no label \(1\)"),
        (["b", "a", "b"], [1, 0, 1]),
        ([0, 2.0, 1], [0, 2, 1]),
        ([0, None, 1], r"1 of 3 images have no label \(1\)"),
        ([0, [0, 1], 1], r"a label is \[0, 1\]; expected the index or the name"),
    ],
)
def test_labels_in_shards(tmp_path: Path, labels: list[Any], found: Any) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for k, label in enumerate(labels):
            add(archive, f"{k}.png", png(pixels(3)[k]))
            if isinstance(label, str):
                add(archive, f"{k}.cls", label.encode())
            else:
                add(archive, f"{k}.json", json.dumps({"label": label}).encode())
    if isinstance(found, str):
        with pytest.raises(DataError, match=found):
            load_images(tmp_path / "a.tar", image_size=SIZE)
        return
    read = load_images(tmp_path / "a.tar", image_size=SIZE)
    assert (None if read.labels is None else read.labels.tolist()) == found


def members(path: Path, names: list[tuple[str, int]]) -> Path:
    """Write an archive: a name, and the picture and label that it holds."""
    with tarfile.open(path, "w") as archive:
        for name, k in names:
            add(archive, name, png(pixels(12)[k]) if name.endswith("png") else str(k % 3).encode())
    return path


def test_names_that_come_again_in_a_shard(tmp_path: Path) -> None:
    again = [(f"{k % 4}.{kind}", k) for k in range(12) for kind in ("png", "cls")]
    apart = [(f"{k}.{kind}", k) for kind in ("png", "cls") for k in range(12)]
    for names in (again, apart):
        found = load_images(members(tmp_path / "a.tar", names), image_size=SIZE)
        assert torch.equal(found.images, expected(pixels(12)))
        assert found.labels is not None
        assert found.labels.tolist() == [k % 3 for k in range(12)]
    twice = members(tmp_path / "a.tar", [("0.png", 0), ("0.png", 1)])
    with pytest.raises(DataError, match=r"0\.png stands twice in one sample"):
        load_images(twice, image_size=SIZE)


def parquet_of(path: Path, count: int = 2, names: tuple[str, ...] = NAMES) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"image": {"_type": "Image"}, "y": {"_type": "ClassLabel", "names": list(names)}}
    pictures = [{"bytes": png(x), "path": None} for x in pixels(count)]
    table = pa.table({"image": pictures, "y": [k % 3 for k in range(count)]})
    noted = json.dumps({"info": {"features": features}})
    parquet.write_table(table.replace_schema_metadata({"huggingface": noted}), path)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ("train-{}", "test-{}", "test*"),
        ("cats_Train_{}", "cats_val_{}", "cats_val*"),
        ("training{}", "eval{}", "eval*"),
    ],
)
def test_files_of_several_parts_are_no_set(
    tmp_path: Path, kind: str, first: str, second: str, named: str
) -> None:
    def write_one(name: str) -> None:
        path = tmp_path / f"{name}.{kind}"
        shard(path, 0, 3) if kind == "tar" else parquet_of(path)

    for k in range(2):
        write_one(first.format(k))
        write_one(second.format(k))
    for spec in (tmp_path, f"{tmp_path}/*.{kind}"):
        with pytest.raises(
            DataError,
            match=r"the parts of a data set \(.*, train\), not one set|"
            r"the parts of a data set \(train, val\), not one set",
        ) as raised:
            load_images(spec, image_size=SIZE)
        one = str(raised.value).rpartition("such as ")[2]
        assert one == str(tmp_path / f"{named}.{kind}")
        with pytest.raises(DataError, match="not one set"):
            ImageSource(str(spec)).digest()
    found = load_images(one, image_size=SIZE)
    assert len(found) == (6 if kind == "tar" else 4)
    assert len(ImageSource(one).digest()) == 64
    for path in tmp_path.glob(first.format("*")):
        path.unlink()
    assert torch.equal(load_images(tmp_path, image_size=SIZE).images, found.images)


def test_files_beside_class_folders(tmp_path: Path) -> None:
    shard(tmp_path / "backup.tar")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(pixels()[0]))
    with pytest.raises(DataError, match=r"both backup\.tar and folders of images \(cat\)"):
        load_images(tmp_path, image_size=SIZE)
    assert len(load_images(tmp_path / "backup.tar", image_size=SIZE)) == 6


def test_a_folder_around_shards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shard(tmp_path / "data" / "0.tar")
    with pytest.raises(DataError, match=r"zero images .*; data holds \.tar files: name /.*data$"):
        load_images(tmp_path, image_size=SIZE)


def test_parquet_files_of_different_sets(tmp_path: Path) -> None:
    parquet_of(tmp_path / "0.parquet")
    parquet_of(tmp_path / "1.parquet", names=("owl", "cat", "dog"))
    with pytest.raises(DataError, match=r"1\.parquet: its class names are others than those of"):
        load_images(tmp_path, image_size=SIZE)
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [png(pixels(1)[0])]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet: has no column 'y'"):
        load_images(tmp_path, image_size=SIZE)


def test_hostile_members_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(pixels(12)[11]))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "../../escape.png", png(pixels(1)[0]))
        add(archive, "/etc/absolute.png", png(pixels(1)[0]))
        add(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname=str(secret))
        add(archive, "hard.png", b"", type=tarfile.LNKTYPE, linkname=str(secret))
        add(archive, "pipe.png", b"", type=tarfile.FIFOTYPE)
        add(archive, "label.cls", b"3")
        add(archive, "broken.png", b"no picture")
        add(archive, "a.json", json.dumps({"label": "x"}).encode())
    before = set(tmp_path.rglob("*"))
    found = load_images(tmp_path / "a.tar", image_size=SIZE)
    assert len(found) == 2
    assert torch.equal(found.images, expected(pixels(1)).expand(2, -1, -1, -1))
    assert set(tmp_path.rglob("*")) == before
    assert found.report is not None
    left_out = {why: len(names) for why, names in found.report.left_out.items()}
    assert left_out == {"no plain files": 3, "samples without a picture": 2, "cannot be read": 1}
    with pytest.raises(DataError, match="3 no plain files"):
        load_images(tmp_path / "a.tar", image_size=SIZE, strict=True)


def test_archives_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match="cannot be read as a tar file"):
        load_images(tmp_path / "a.tar", image_size=SIZE)
    whole = shard(tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:2100])
    found = load_images(tmp_path / "b.tar", image_size=SIZE)
    assert found.report is not None
    assert "1 archives that are cut off (b.tar)" in str(found.report.line())
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        add(archive, "x", b"")
    raw = bytearray((tmp_path / "c.tar").read_bytes())
    raw[124:136] = b"\x80" + struct.pack(">11s", (1 << 60).to_bytes(11, "big"))
    raw[156:157] = b"x"  # a header of an exabyte
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    (tmp_path / "c.tar").write_bytes(bytes(raw))
    with pytest.raises(DataError, match="a header of 1,152,921"):
        load_images(tmp_path / "c.tar", image_size=SIZE)


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": png(x), "path": None} for x in pixels()]
    features = {"img": {"_type": "Image"}, "y": {"_type": "ClassLabel", "names": list(NAMES)}}
    table = pa.table({"id": list(range(6)), "img": rows, "y": [0, 1, 2, 0, 1, 2]})
    noted = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": noted})
    parquet.write_table(table, tmp_path / "0.parquet", row_group_size=4)
    for spec in (tmp_path / "0.parquet", tmp_path):
        found = load_images(spec, image_size=SIZE)
        assert torch.equal(found.images, expected(pixels()))
        assert found.class_names == NAMES
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    few = load_images(tmp_path, image_size=SIZE, max_images=3)
    assert few.labels is not None
    assert sorted(few.labels.tolist()) == [0, 1, 2]
    assert ImageSource(str(tmp_path)).digest() == ImageSource(str(tmp_path / "0.parquet")).digest()


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r'pip install "pydetox\[parquet\]"'):
        load_images(tmp_path / "a.parquet", image_size=SIZE)


def test_a_set_of_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = pixels(4, 28)[..., 0]
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, 4, 28, 28) + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, 4) + bytes([7, 0, 7, 1])
        )
    found = load_images(f"mnist-test={tmp_path}", image_size=28)
    assert torch.equal(found.images[:, 0], torch.from_numpy(images.copy()))
    assert found.class_names is not None
    assert found.class_names[7] == "7 - seven"
    assert found.labels is not None
    assert found.labels.tolist() == [7, 0, 7, 1]
    assert len(ImageSource(f"mnist={tmp_path}").digest()) == 64
    with pytest.raises(DataError, match=r"torchvision\.datasets\.CIFAR10\(.*, download=True"):
        load_images(f"cifar10={tmp_path}", image_size=28)
    with pytest.raises(DataError, match="cifar10=FOLDER or cifar10-test=FOLDER"):
        load_images("cifar10", image_size=28)


def test_class_names_and_templates_of_imagenet_by_name(tmp_path: Path) -> None:
    import open_clip

    assert load_class_names("imagenet") == tuple(open_clip.IMAGENET_CLASSNAMES)
    templates = load_templates("imagenet")
    assert [t.replace("{c}", "X") for t in templates if isinstance(t, str)] == [
        t("X") for t in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]
    assert len(load_templates("imagenet-simple")) == len(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    # Folders with WordNet ids, of some classes only, get the labels of ImageNet.
    for name in ("n02102040", "n01440764"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(1)[0]).save(tmp_path / name / "a.png")
    found = load_images(tmp_path, image_size=SIZE, class_names=load_class_names("imagenet"))
    assert found.labels is not None
    assert found.class_names is not None
    names = [found.class_names[k] for k in found.labels.tolist()]
    assert names == ["tench", "English springer"] or "Springer" in names[1]
    with pytest.raises(DataError, match="no list of class names of that name; known are imagenet"):
        load_class_names("no-such-list")


def test_lists_of_clip_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydetox.data import named_lists

    package = tmp_path / "clip_benchmark" / "datasets"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "en_classnames.json").write_text(json.dumps({"pets": ["cat", "dog"]}))
    (package / "en_zeroshot_classification_templates.json").write_text(
        json.dumps({"pets": ["a {c}", "one {c}"]})
    )
    (package / "cupl_prompts.json").write_text(json.dumps({"pets": {"cat": ["soft"]}}))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("clip_benchmark", "clip_benchmark.datasets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    named_lists._of_clip_benchmark.cache_clear()
    try:
        assert load_class_names("wds/vtab/pets") == ("cat", "dog")
        assert load_templates("pets") == ("a {c}", "one {c}")
        assert fill_templates(load_templates("cupl:pets"), "cat") == ["soft"]
    finally:
        named_lists._of_clip_benchmark.cache_clear()


def test_prompts_of_each_class(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"cat": ["soft", "it purrs", "soft"], "dog": ["it barks"]}))
    assert fill_templates(load_templates(path), "cat") == ["soft", "it purrs", "soft"]
    assert fill_templates(load_templates(path), "dog") == ["it barks"]
    path.write_text(json.dumps({"cat": ["soft", "it purrs"], "dog": ["it barks"]}))
    templates = load_templates(path)
    assert fill_templates((*templates, *templates, "a {}", "a {}"), "dog") == ["it barks", "a dog"]
    assert fill_templates(templates, "cat") == ["soft", "it purrs"]
    assert fill_templates(templates, "dog") == ["it barks"]
    assert repr(load_templates(path)) == repr(templates)
    with pytest.raises(DataError, match="no prompts for the class 'owl'"):
        fill_templates(templates, "owl")
    path.write_text(json.dumps(["a {c}", "one {}"]))
    assert load_templates(path) == ("a {c}", "one {}")
    for content, message in (
        ({"cat": []}, "class 'cat' has no list of prompts"),
        (["a cat"], "no place for the class name"),
        (3, "expected a JSON list of templates"),
        ({"cat": ["soft"], "dog": ["{}"]}, r"class 'dog': prompt '\{\}' has a place for a class"),
        ({"cat": ["soft", "a {c}"]}, r"class 'cat': prompt 'a \{c\}' .*; expected whole prompts"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            load_templates(path)
    path.write_text('{"cat": ["soft"], "dog": ["it barks"], "cat": ["hard"]}')
    with pytest.raises(DataError, match=r"cannot read templates: the key 'cat' is there twice"):
        load_templates(path)
    path.write_text(json.dumps(["cat", "dog"]))
    assert load_class_names(path) == ("cat", "dog")


def test_numbers_of_pixels_do_not_change_with_the_source(tmp_path: Path, files: list[Path]) -> None:
    table = write(tmp_path / "a.csv", ["path", *map(str, files)])
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as out:
        for path in files:
            out.add(path, path.name)
    sets = [load_images(x, image_size=5) for x in (table, archive, tmp_path / "pics", files)]
    assert all(torch.equal(one.images, sets[0].images) for one in sets)
    assert np.asarray(sets[0].images).shape == (6, 3, 5, 5)


def test_folders_in_an_archive_are_no_classes_and_that_is_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for k, name in enumerate(("cat", "dog")):
            add(archive, f"photos/{name}/{k}.png", png(pixels(2)[k]))
    found = load_images(tmp_path / "a.tar", image_size=SIZE)
    assert found.labels is None
    assert found.report is not None
    assert "2 folders in it (photos/cat, photos/dog) are no classes" in str(found.report.line())
    for name in ("photos.zip", "photos.tar.gz", "photos.TGZ"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=r"unpack it, and name the folder"):
            load_images(tmp_path / name, image_size=SIZE)
