"""The table of open_clip's architectures, in a sampled form."""

from __future__ import annotations

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from click.testing import CliRunner
from torch.nn.functional import cosine_similarity

from pydetox.checkpoints.architecture import named_config
from pydetox.cli import cli
from pydetox.errors import ArchitectureError, DataError
from pydetox.models import OpenClipModel
from pydetox.models.building import NoRandomNumbers, build
from pydetox.models.catalogue import building_obstacle, listed_models
from pydetox.research.architectures import (
    LEAST_COSINE,
    Measured,
    cosine,
    in_own_process,
    measure_model,
    read_rows,
    write_row,
)
from pydetox.research.cut_models import cut, fill, images_of, shortened
from pydetox.research.models_page import markdown_page
from pydetox.research.transformers_models import classes, measure_class

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
LISTED = {one.name: one for one in listed_models()}


def test_every_architecture_is_listed_and_most_are_read() -> None:
    assert list(LISTED) == open_clip.list_models()
    assert all(one.obstacle is None for one in LISTED.values())
    unknown = building_obstacle({"text_cfg": {"hf_model_name": "nobody/tower"}})
    assert unknown is not None
    assert "of transformers, whose configuration only the hub has" in unknown
    assert LISTED["ViT-B-16-SigLIP"].tokenizer == "timm/ViT-B-16-SigLIP"
    assert LISTED["ViT-L-14"].guessed == ("mean", "std")


@pytest.mark.parametrize("name", [*open_clip.list_models()[::24], "coca_ViT-B-32"])
def test_what_is_read_is_built_and_what_is_not_says_why(name: str) -> None:
    config = shortened(named_config(name))
    if not config["text_cfg"].get("hf_model_name") or find_spec("transformers"):
        with torch.device("meta"):
            assert OpenClipModel.from_config(config, seed=0).num_parameters > 0
        return
    with pytest.raises(ArchitectureError, match="pip install transformers"):
        OpenClipModel.from_config(config, seed=0)


def test_a_text_tower_of_transformers_needs_transformers() -> None:
    if find_spec("transformers"):
        pytest.skip("transformers is installed")
    with pytest.raises(ArchitectureError, match="'roberta-base' of transformers: pip install"):
        OpenClipModel.from_config(named_config("roberta-ViT-B-32"), seed=0)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("ViT-S-32", "images 2/12, texts 2/12"),
        ("ViT-B-32-SigLIP2-256", "images 2/12, texts 2/12, tokens 4096/256000"),
    ],
)
def test_equal_to_open_clip_searched_and_written_back(name: str, cut: str) -> None:
    found = measure_model(name)
    assert found.problem is None
    assert found.image_cosine >= 1 - 1e-5
    assert found.text_cosine is not None
    assert found.text_cosine >= 1 - 1e-5
    assert found.searched
    assert found.written_back
    assert found.unlearned
    assert found.cut == cut
    by_the_hub = LISTED[name].tokenizer is not None
    assert found.evaluated or (by_the_hub and not find_spec("transformers"))
    assert found.stand_in == (by_the_hub and bool(found.evaluated))


def test_towers_of_timm_are_cut_for_both_libraries() -> None:
    whole = named_config("convnext_xxlarge")
    with cut(whole) as made, torch.device("meta"):
        ours = build(made.config, None, "cut").visual.state_dict()
        theirs = open_clip.create_model("convnext_xxlarge", device="meta").visual.state_dict()
    assert made.words == "images 2+2+2+2/3+4+30+3, texts 2/24"
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    with torch.device("meta"):
        blocks = timm.create_model("convnext_xxlarge").stages[2].blocks
    assert len(blocks) == 30  # nothing is cut any more


def test_weights_show_what_is_exchanged() -> None:
    with cut(named_config("ViT-S-32")) as made:
        tower = build(made.config, None, "cut").eval()
    fill(tower, "cut")
    state = {key: value.clone() for key, value in tower.visual.state_dict().items()}
    pixels = images_of("cut", 224) / 255
    block = "transformer.resblocks.{}.{}"
    with torch.no_grad():
        before = tower.visual(pixels)
        assert float(cosine_similarity(before[:1], before[1:])) < 0.999  # far from 1 - 1e-5
        for one, other in (
            (block.format(0, "ln_1.weight"), block.format(0, "ln_2.weight")),
            (block.format(0, "ln_1.bias"), block.format(1, "ln_1.bias")),
            (block.format(0, "attn.out_proj.weight"), block.format(1, "attn.out_proj.weight")),
        ):
            tower.visual.load_state_dict({**state, one: state[other], other: state[one]})
            assert cosine(tower.visual(pixels), before) < LEAST_COSINE


def test_uninitialised_weights_end_the_drawing_of_truncated_numbers() -> None:
    weight = torch.full((4, 4), 9.0)
    with NoRandomNumbers():
        torch.nn.init.trunc_normal_(weight, std=0.02)  # torch repeats until all are within [-2, 2]
    assert bool((weight.abs() <= 2).all())


def test_a_class_of_transformers_equals_transformers() -> None:
    pytest.importorskip("transformers")
    found = measure_class("CLIPVisionModelWithProjection")
    assert found.problem is None
    assert found.image_cosine >= 1 - 1e-5
    assert found.text_cosine is None
    assert found.written_back
    assert found.unlearned
    assert len(classes()) >= 12


def _named(name: str) -> Measured:
    return Measured(1.0, None, True, True, name, os.getpid(), 2.5)


def _killed(name: str) -> Measured:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(name)


def test_every_architecture_has_a_process_of_its_own() -> None:
    first, second = (in_own_process(_named, name) for name in ("one", "other"))
    assert [first.tower, second.tower] == ["one", "other"]
    assert len({first.parameters, second.parameters, os.getpid()}) == 3
    with pytest.raises(DataError, match="third: the process that measured it was ended"):
        in_own_process(_killed, "third")


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    cache, page = tmp_path / "rows.jsonl", tmp_path / "models.md"
    row = Measured(1.0, None, True, True, "its own module, float32", 7, 2.5, unlearned=True)
    write_row(cache, "ViT-S-32", row)
    write_row(cache, "SiglipModel", row)
    assert read_rows(cache) == {"ViT-S-32": row, "SiglipModel": row}
    assert read_rows(tmp_path / "none") == {}
    command = ["models", "ViT-S-32", "--cache", str(cache), "--measure", "--markdown", str(page)]
    result = CliRunner().invoke(cli, command)  # all that is asked for is there already
    assert result.exit_code == 0
    assert "its own module" in page.read_text()
    line = "| `SiglipModel` | 1.000000 |  |  | yes | yes |  | 2.5 |"
    assert line in markdown_page(list(LISTED.values()), read_rows(cache))
    cache.write_text("{}\n")
    with pytest.raises(DataError, match="line 1: is no row"):
        read_rows(cache)


def test_the_command() -> None:
    result = CliRunner().invoke(cli, ["models", "ViT-B-32*", "--format", "json"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["models"]
    assert [row["name"] for row in rows if row["name"] == "ViT-B-32"] == ["ViT-B-32"]
    assert all(row["measured"] is None for row in rows)
    text = CliRunner().invoke(cli, ["models", "roberta*", "ViT-H-14"]).stdout
    assert "(a guess: resize_mode)" in text
    assert "2 of 2 are read" in text
    wrong = CliRunner().invoke(cli, ["models", "no-such"])
    assert wrong.exit_code == 4


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package has no docs")
def test_the_page_has_a_row_for_each() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in LISTED if f"| `{name}` |" not in page] == []
    assert "fails" not in page
