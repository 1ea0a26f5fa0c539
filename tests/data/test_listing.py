"""Folders as people have them: what counts as an image, what does not, and what is said of it."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pydetox.data import ImageSource, load_images
from pydetox.errors import DataError

from .test_folder import make_folder, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", {"cat": 3, "dog": 2})


def counted(folder: Path, **given: object) -> tuple[list[int], dict[str, list[str]], str | None]:
    found = load_images(folder, image_size=8, **given)  # type: ignore[arg-type]
    assert found.report is not None
    assert found.report.images == len(found)
    labels = [] if found.labels is None else found.labels.tolist()
    return labels, found.report.left_out, found.report.line()


GOOD = [0, 0, 0, 1, 1]


def test_nothing_is_said_of_a_good_folder(photos: Path) -> None:
    (photos / "README.md").write_text("mine")
    (photos / "cat" / "000.json").write_text("{}")
    labels, left_out, line = counted(photos, strict=True)
    assert labels == GOOD
    assert left_out == {"no image by its name": ["README.md", "cat/000.json"]}
    assert line is None


@pytest.mark.parametrize(
    "name", ["@eaDir", ".ipynb_checkpoints", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".thumbs"]
)
def test_folders_of_the_system_never_count(photos: Path, name: str) -> None:
    for place in (photos, photos / "cat", photos / "dog" / "deeper"):
        (place / name).mkdir(parents=True)
        picture(9, 9).save(place / name / "000.png")
        (place / name / "broken.png").write_bytes(b"not one")
    labels, left_out, line = counted(photos, strict=True)
    assert labels == GOOD
    assert len(left_out["hidden or of the system"]) == 3
    assert line is None


def test_links(photos: Path, tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside", {"more": 2})
    (photos / "cat" / "loop").symlink_to(photos / "cat")
    (photos / "cat" / "up").symlink_to(photos)
    (photos / "cat" / "cousins").symlink_to(photos / "dog")
    (photos / "cat" / "above").symlink_to(tmp_path)
    (photos / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "dog" / "elsewhere").symlink_to(outside / "more")
    (outside / "more" / "circle").symlink_to(outside / "more")
    (photos / "owl").symlink_to(tmp_path / "nowhere")
    labels, left_out, line = counted(photos)
    assert labels == [*GOOD, 1, 1]
    assert left_out == {
        "links back into the folder": ["cat/above", "cat/cousins", "cat/loop", "cat/up"],
        "links that lead nowhere": ["owl", "cat/gone.png"],
        "links in a circle": ["dog/elsewhere/circle"],
    }
    assert line is not None
    assert "2 links that lead nowhere (owl, cat/gone.png)" in line
    with pytest.raises(DataError, match="expected nothing else"):
        load_images(photos, image_size=8, strict=True)


def test_other_formats_empty_classes_and_stray_files_are_counted(photos: Path) -> None:
    for name in ("a.heic", "b.HEIF", "c.avif", "d.dng"):
        (photos / "cat" / name).write_bytes(b"something")
    (photos / "empty").mkdir()
    picture(30, 30).save(photos / "contact-sheet.png")
    labels, left_out, line = counted(photos)
    assert labels == GOOD
    assert left_out == {
        "of a format that is not read": ["cat/a.heic", "cat/b.HEIF", "cat/c.avif", "cat/d.dng"],
        "beside the class folders": ["contact-sheet.png"],
        "without an image that is read, and no class here": ["empty"],
    }
    assert line == (
        f"{photos}: 5 images of 2 classes; left out: 1 beside the class folders "
        "(contact-sheet.png), 4 of a format that is not read (cat/a.heic, cat/b.HEIF, "
        "cat/c.avif, …), 1 without an image that is read, and no class here (empty)"
    )
    only = photos.parent / "only"
    (only / "cat").mkdir(parents=True)
    (only / "cat" / "a.heic").write_bytes(b"something")
    with pytest.raises(DataError, match=r"zero images in its folders \(left out: 1 of a format"):
        load_images(only, image_size=8)


def test_as_many_images_as_folders_are_no_stray_ones(photos: Path) -> None:
    for index in range(2):
        picture(9, 9).save(photos / f"{index}.png")
    with pytest.raises(DataError, match=r"holds both images \(0\.png\) and folders \(cat\)"):
        load_images(photos, image_size=8)


def test_folders_that_cannot_be_listed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Path.iterdir

    def refuse(path: Path) -> object:
        if path.name == "dog":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    labels, left_out, line = counted(photos)
    assert labels == [0, 0, 0]
    assert left_out["folders that cannot be listed: Permission denied"] == ["dog"]
    assert line is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(photos: Path) -> None:
    (photos / "cat" / "000.png").chmod(0)
    labels, left_out, _ = counted(photos)
    assert labels == GOOD[1:]
    assert left_out == {"that cannot be read as images": ["cat/000.png"]}


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Test", "dev")])
def test_parts_of_a_data_set_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    make_folder(tmp_path / "set", {f"{name}/{c}": 1 for name in names for c in ("cat", "dog")})
    with pytest.raises(DataError, match=r"parts of a data set .* name one of them, such as /"):
        load_images(tmp_path / "set", image_size=8)
    assert counted(tmp_path / "set" / names[0])[0] == [0, 1]
    # Trains are a class where the caller says so, or beside others.
    assert counted(tmp_path / "set", class_names=[*names, "car"])[0] != []
    make_folder(tmp_path / "vehicles", {"train": 1, "car": 1})
    assert counted(tmp_path / "vehicles")[0] == [0, 1]


def test_class_folders_that_look_the_same(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", {"Seven": 1, "seven": 2})
    with pytest.raises(DataError, match=r"'Seven' and 'seven' differ in case alone"):
        load_images(tmp_path / "a", image_size=8)
    assert counted(tmp_path / "a", class_names=["seven", "Seven"])[0] == [0, 0, 1]
    composed = unicodedata.normalize("NFC", "café")
    decomposed = unicodedata.normalize("NFD", "café")
    make_folder(tmp_path / "b", {composed: 1, decomposed: 1})
    with pytest.raises(DataError, match="differ in how Unicode writes them alone"):
        load_images(tmp_path / "b", image_size=8)
    make_folder(tmp_path / "c", {decomposed: 1, "tea": 1})
    assert counted(tmp_path / "c", class_names=["tea", composed])[0] == [0, 1]
    assert load_images(tmp_path / "c", image_size=8).class_names == (composed, "tea")


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", {str(k): 1 for k in range(12)})
    found = load_images(tmp_path / "set", image_size=8)
    assert found.class_names == tuple(map(str, range(12)))
    names = [f"class {k}" for k in range(12)]
    for required in (True, False):
        found = load_images(
            tmp_path / "set", image_size=8, class_names=names, labels_required=required
        )
        assert found.labels is not None
        assert found.labels.tolist() == list(range(12))
        assert found.class_names == tuple(names)
    for required in (True, False):
        with pytest.raises(DataError, match=r"numbers 0\.\.11, .* none above 10 for the 11 class"):
            load_images(
                tmp_path / "set", image_size=8, class_names=names[:11], labels_required=required
            )


@pytest.mark.parametrize("required", [True, False])
def test_numbers_with_zeros_before_them_and_without_a_zero(tmp_path: Path, required: bool) -> None:
    names = ["stop", "go", "yield"]
    make_folder(tmp_path / "padded", {f"{k:05}": k + 1 for k in (0, 2)})
    given = {"image_size": 8, "class_names": names, "labels_required": required}
    found = load_images(tmp_path / "padded", **given)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 2, 2, 2]
    assert load_images(tmp_path / "padded", image_size=8).class_names == ("00000", "00002")
    for folders in (("1", "2", "3"), ("1", "2"), ("01", "02")):
        root = make_folder(tmp_path / "-".join(folders), dict.fromkeys(folders, 1))
        if not required and len(folders) < 3:  # perhaps months
            assert load_images(root, **given).labels is None
            continue
        with pytest.raises(DataError, match=r"which count classes from 0; expected a folder 0"):
            load_images(root, **given)
    make_folder(tmp_path / "years", {"2019": 1, "2020": 1})
    if not required:
        assert load_images(tmp_path / "years", **given).labels is None


@pytest.mark.parametrize("required", [True, False])
def test_names_that_read_the_same_are_shown(tmp_path: Path, required: bool) -> None:
    make_folder(tmp_path / "set", {"Cat": 1, "sea_lion": 1})
    for names, message in (
        (["cat", "dog"], "class 'Cat' is not one of .*; did you mean 'cat'"),
        (["Cat", "sea lion"], "class 'sea_lion' is not one of .*; did you mean 'sea lion'"),
        (["Cat", "sea lions"], "class 'sea_lion' is not one of .*; did you mean 'sea lions'"),
    ):
        with pytest.raises(DataError, match=message):
            load_images(tmp_path / "set", image_size=8, class_names=names, labels_required=required)


def test_a_folder_around_the_classes_is_no_class(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", {"images/cat": 1, "images/dog": 2})
    make_folder(tmp_path / "b", {"data/train/cat": 1, "data/train/dog": 2})
    make_folder(tmp_path / "c", {"images/cat": 1, "images/dog": 2})
    (tmp_path / "c" / "labels").mkdir()
    for name, inner in (("a", "images"), ("b", "data/train"), ("c", "images")):
        for names, required in ((None, True), (["cat", "dog"], True), (["cat", "dog"], False)):
            with pytest.raises(DataError, match="holds no images but the folders cat, dog; ") as e:
                load_images(
                    tmp_path / name, image_size=8, class_names=names, labels_required=required
                )
            assert str(e.value).endswith(f"name {tmp_path / name / inner}")
        assert counted(tmp_path / name / inner)[0] == [0, 1, 1]
    # A class may have folders of its own, where its name is known or where it is one of several.
    assert counted(tmp_path / "a", class_names=["images", "x"])[0] == [0, 0, 0]
    make_folder(tmp_path / "a", {"other": 1})
    assert counted(tmp_path / "a")[0] == [0, 0, 0, 1]


def test_what_datasets_saves_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "train").mkdir()
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (tmp_path / "train" / name).write_bytes(b"{}")
    for folder in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match=r"written by save_to_disk .* with to_parquet"):
            load_images(folder, image_size=8)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.pbm", "PPM"), ("a.pnm", "PPM")]
)
def test_other_endings_of_images(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "cat").mkdir()
    drawn = picture(9, 9).convert("1" if name.endswith("pbm") else "RGB")
    drawn.save(tmp_path / "cat" / name, kind)
    (tmp_path / "cat" / "a.tga").write_bytes(b"")
    labels, left_out, _ = counted(tmp_path)
    assert labels == [0]
    assert left_out == {"of a format that is not read": ["cat/a.tga"]}


def test_panoramas_are_left_out_in_our_own_words(photos: Path) -> None:
    from .test_folder import png_header

    for side in (9_500, 20_000):
        (photos / "cat" / f"{side}.png").write_bytes(png_header(side, side))
    labels, left_out, _ = counted(photos)
    assert labels == GOOD
    assert left_out == {"that cannot be read as images": ["cat/20000.png", "cat/9500.png"]}
    with pytest.raises(DataError, match="more pixels than the 89,478,485 that are read"):
        load_images(photos, image_size=8, strict=True)


def test_images_of_32_bits_keep_their_pixels(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    (tmp_path / "set").mkdir()
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "set" / "a.tiff")
    found = load_images(tmp_path / "set", image_size=8).images[0, 0]
    assert np.array_equal(found.numpy(), grey)


def test_pillow_says_nothing(
    photos: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    image = picture(8, 8).convert("P")
    image.save(photos / "cat" / "palette.png", transparency=bytes(range(256)))
    (photos / "cat" / "large.png").write_bytes(b"")
    load_images(photos, image_size=8)
    assert len(recwarn) == 0
    assert capfd.readouterr().err == ""


def test_names_are_known_before_anything_is_decoded(photos: Path) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"never opened")
    assert ImageSource(str(photos)).known_names() == ("cat", "dog")
    assert ImageSource("digits").known_names() is not None


def test_what_is_left_out_does_not_change_the_digest_and_unreadable_files_do(photos: Path) -> None:
    before = ImageSource(str(photos)).digest()
    (photos / "cat" / "more.heic").write_bytes(b"something")
    (photos / "empty").mkdir()
    assert ImageSource(str(photos)).digest() == before
    (photos / "cat" / "000.png").write_bytes(b"")
    assert ImageSource(str(photos)).digest() != before


def test_values_that_become_white_are_said(tmp_path: Path) -> None:
    grey = np.full((8, 8), 200, dtype=np.uint16)
    for k in range(4):
        Image.fromarray(grey * 257 if k < 3 else grey).save(tmp_path / f"{k}.png")
    images = load_images(tmp_path, image_size=8)
    assert images.images[:3].min() == 255
    assert images.images[3].max() == 200
    line = images.report.line()
    assert line is not None
    assert "3 with grey values above 255, which become white, as in open_clip (0.png)" in line
    with pytest.raises(DataError, match="above 255"):
        load_images(tmp_path, image_size=8, strict=True)
