from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from pydetox.checkpoints import load_checkpoint
from pydetox.cli import cli
from pydetox.inversion.trigger_file import load_triggers
from pydetox.models import OpenClipModel

from .conftest import FAST, Run, error_line, write_images


class TestInvert:
    def test_all_classes(self, run: Run, folder: Path, images: tuple, tmp_path: Path) -> None:
        output = tmp_path / "triggers"
        args = (*images, *FAST, "--output", output, "--format", "json")
        result = run("invert", folder / "suspect", *args)
        assert result.exit_code == 0
        content = json.loads(result.stdout)
        assert content["schema"] == "pydetox.invert/1"
        assert [t["target"] for t in content["triggers"]] == ["cat", "dog", "cow"]
        assert [t["steps"] for t in content["triggers"]] == [3, 3, 3]
        names = [f"{k:04d}_{n}" for k, n in enumerate(("cat", "dog", "cow"))]
        kinds = ("mask", "pattern", "stamped")
        expected = {f"{name}_{kind}.png" for name in names for kind in kinds}
        assert {p.name for p in output.iterdir()} == expected | {"triggers.safetensors"}

        with safe_open(output / "triggers.safetensors", "pt") as file:
            assert set(file.keys()) == {"mask", "pattern", "p_l1", "success"}
            mask, pattern = file.get_tensor("mask"), file.get_tensor("pattern")
            sizes = file.get_tensor("p_l1")
            told = json.loads(file.metadata()["pydetox"])
        assert mask.shape == (3, 16, 16)
        assert pattern.shape == (3, 3, 16, 16)
        assert told["targets"] == ["cat", "dog", "cow"]
        assert told["trigger_steps"] == [3, 3, 3]
        assert told["sha256"] == load_checkpoint(folder / "suspect").sha256
        found = sizes.isfinite()
        assert bool(found.any())
        torch.testing.assert_close(mask.double().mean(dim=(1, 2))[found], sizes[found])

        picture = np.asarray(Image.open(output / "0001_dog_mask.png"))
        np.testing.assert_array_equal(picture, (255 * mask[1]).round().to(torch.uint8).numpy())
        stamped = np.asarray(Image.open(output / "0001_dog_stamped.png"), dtype=np.float64)
        clean = np.load(folder / "images.npz")["images"].astype(np.float64)
        m = mask[1].double().numpy()[:, :, None]
        blended = (1 - m) * clean + m * 255 * pattern[1].double().permute(1, 2, 0).numpy()
        # One of the images, drawn by the seed.
        assert np.abs(stamped - blended).max(axis=(1, 2, 3)).min() <= 0.5 + 1e-3

    def test_chosen_classes(self, run: Run, folder: Path, images: tuple, tmp_path: Path) -> None:
        output = tmp_path / "triggers"
        run(
            *("invert", folder / "suspect", *images, *FAST, "--output", output),
            *("--target", "cow", "--target", "cat", "--restarts", "2"),
        )
        triggers = load_triggers(output / "triggers.safetensors")
        assert triggers.targets == ("cow", "cat")
        assert "0000_cow_mask.png" in {p.name for p in output.iterdir()}

    def test_label_free(self, run: Run, folder: Path, images: tuple, tmp_path: Path) -> None:
        output = tmp_path / "triggers"
        args = (*images, "--steps", "3", "--output", output, "--objective", "label-free")
        result = run("invert", folder / "suspect", *args, "--restarts", "2")
        assert result.exit_code in (0, 2)
        assert load_triggers(output / "triggers.safetensors").targets == (None,)
        assert (output / "0000_mask.png").exists()
        assert run("invert", "x", *args, "--target", "cat").exit_code == 4

    def test_no_search_found_anything(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        """A class that the images never get in three steps."""
        output = tmp_path / "triggers"
        args = (*images, "--steps", "1", "--batch-size", "4", "--output", output)
        result = run("invert", folder / "suspect", *args, "--format", "json")
        sizes = {t["target"]: t["p_l1"] for t in json.loads(result.stdout)["triggers"]}
        never = next(name for name, size in sizes.items() if size is None)
        result = run("invert", folder / "suspect", *args, "--target", never, "--overwrite")
        assert result.exit_code == 2
        assert "no working trigger found" in result.stdout
        assert not torch.isfinite(load_triggers(output / "triggers.safetensors").p_l1).any()

    def test_unknown_class(self, run: Run, folder: Path, images: tuple, tmp_path: Path) -> None:
        output = tmp_path / "triggers"
        args = (*images, *FAST, "--output", output, "--target", "unicorn")
        result = run("invert", folder / "suspect", *args)
        assert result.exit_code == 4
        assert "images.npz; it has 'cat', 'dog', 'cow'" in error_line(result)
        assert not output.exists()

    def test_class_names_do_not_lead_out_of_the_folder(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        names = tmp_path / "names.txt"
        names.write_text("../../x\n/etc/passwd\n\N{SNOWMAN}\n")
        bare = write_images(tmp_path / "bare.npz", 6, class_names=None)
        output = tmp_path / "triggers"
        args = ("--images", bare, *FAST, "--output", output, "--class-names", names)
        assert run("invert", folder / "suspect", *args).exit_code in (0, 2)
        masks = sorted(p.name for p in output.glob("*_mask.png"))
        assert masks == ["0000_x_mask.png", "0001_etc-passwd_mask.png", "0002_mask.png"]

    def test_overwrites_only_when_told_and_only_its_own(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        output = tmp_path / "triggers"
        args = ("invert", folder / "suspect", *images, *FAST, "--output", output)
        more = ("--target", "cat")
        assert run(*args, *more).exit_code in (0, 2)
        before = (output / "triggers.safetensors").read_bytes()

        refused = run(*args, *more)
        assert refused.exit_code == 2
        assert "is not overwritten" in error_line(refused)
        assert (output / "triggers.safetensors").read_bytes() == before

        run(*args, "--target", "dog", "--overwrite")
        assert load_triggers(output / "triggers.safetensors").targets == ("dog",)
        assert not list(output.glob("*cat*"))

        (output / "thesis.tex").write_text("mine")
        refused = run(*args, *more, "--overwrite")
        assert refused.exit_code == 2
        assert "thesis.tex" in error_line(refused)
        assert (output / "thesis.tex").read_text() == "mine"


@pytest.fixture(scope="module")
def triggers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `invert` writes for all classes of the suspect."""
    output = tmp_path_factory.mktemp("eval") / "triggers"
    args = ("--images", folder / "images.npz", *FAST, "--output", output)
    CliRunner().invoke(cli, list(map(str, ("invert", folder / "suspect", *args))))
    return output / "triggers.safetensors"


class TestEval:
    def test_accuracy(self, run: Run, folder: Path, images: tuple) -> None:
        from pydetox.data import DEFAULT_TEMPLATES, load_images
        from pydetox.evaluation import evaluate
        from pydetox.reporting.documents import evaluation_document

        result = run("eval", folder / "suspect", *images, "--format", "json")
        assert result.exit_code == 0
        content = json.loads(result.stdout)
        model = OpenClipModel.from_checkpoint(load_checkpoint(folder / "suspect"))
        image_set = load_images(folder / "images.npz", image_size=16)
        assert image_set.class_names is not None
        head = model.zero_shot_head(image_set.class_names, DEFAULT_TEMPLATES)
        expected = evaluation_document(evaluate(model, image_set, head))
        assert {key: content[key] for key in expected} == expected
        assert content["schema"] == "pydetox.eval/1"
        assert content["class_names"] == ["cat", "dog", "cow"]

    def test_trigger(self, run: Run, folder: Path, images: tuple, triggers: Path) -> None:
        args = (*images, "--trigger", triggers)
        result = run("eval", folder / "suspect", *args, "--target", "dog", "--format", "json")
        content = json.loads(result.stdout)
        assert content["target_name"] == "dog"
        assert content["n_attack"] == 16
        assert 0 <= content["attack_success_rate"] <= 1
        assert "ASR" in run("eval", folder / "suspect", *args, "--target", "dog").stdout

    def test_target_must_be_clear(
        self, run: Run, folder: Path, images: tuple, triggers: Path
    ) -> None:
        args = ("eval", folder / "suspect", *images, "--trigger", triggers)
        assert "name one with --target" in error_line(run(*args))
        assert "no trigger into class" in error_line(run(*args, "--target", "x"))

    def test_no_labels(self, run: Run, folder: Path, tmp_path: Path) -> None:
        bare = write_images(tmp_path / "bare.npz", 6, labels=None)
        result = run("eval", folder / "suspect", "--images", bare)
        assert result.exit_code == 2
        assert "no labels" in error_line(result)

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 no", b"\0" * 64])
    def test_a_trigger_file_that_is_none(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "t.safetensors"
        path.write_bytes(content)
        result = run("eval", folder / "suspect", *images, "--trigger", path)
        assert result.exit_code == 2
        assert "no trigger file" in error_line(result)

    def test_a_trigger_of_another_size(
        self, run: Run, folder: Path, images: tuple, tmp_path: Path
    ) -> None:
        from safetensors.torch import save_file

        path = tmp_path / "t.safetensors"
        save_file({"mask": torch.zeros(1, 8, 8), "pattern": torch.zeros(1, 3, 8, 8)}, path)
        result = run("eval", folder / "suspect", *images, "--trigger", path, "--target", "cat")
        assert result.exit_code == 2
        assert "8x8 pixels; the model takes images of 16x16" in error_line(result)
