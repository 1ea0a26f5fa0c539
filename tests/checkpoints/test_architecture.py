from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pydetox.checkpoints import (
    check_finite,
    check_model_config,
    describe_mismatch,
    read_config,
    resolve_model,
)
from pydetox.checkpoints.architecture import check_preprocess_config
from pydetox.errors import (
    ArchitectureError,
    CheckpointError,
    UnsafeCheckpointError,
    UsageError,
)


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture_of_open_clip(name: str) -> None:
    config, preprocess = resolve_model(name)
    check_model_config(config)
    assert preprocess is None
    assert config == open_clip.get_model_config(name)


def test_resolved_configuration_is_a_copy() -> None:
    resolve_model("ViT-B-32")[0]["vision_cfg"]["width"] = 1
    assert resolve_model("ViT-B-32")[0]["vision_cfg"]["width"] == 768


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-23", "did you mean .*ViT-B-32"),
        ("vit-b-32", "did you mean ViT-B-32"),
        ("zzz", "architecture 'zzz': not known to open_clip$"),
    ],
)
def test_unknown_architecture(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_model(name)


def test_configuration_files(tmp_path: Path, mini_config: dict[str, Any]) -> None:
    bare, full = tmp_path / "bare.json", tmp_path / "full.json"
    preprocess = {"mean": [0.5] * 3, "std": [0.2] * 3}
    bare.write_text(json.dumps(mini_config))
    full.write_text(json.dumps({"model_cfg": mini_config, "preprocess_cfg": preprocess}))
    assert resolve_model(bare) == (mini_config, None)
    assert resolve_model(str(full)) == (mini_config, preprocess)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON file"),
        (b"\xff", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b'{"embed_dim": NaN}', "is not a JSON file"),
        (b"[]", "is not a JSON object"),
        (b"{}", "no positive integer 'embed_dim'"),
        (b'{"model_cfg": 3}', "is not a JSON object"),
        (b" " * ((1 << 20) + 1), "has 1048577 bytes"),
    ],
)
def test_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ArchitectureError, match=message) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be opened: No such file"):
        resolve_model(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embed_dim": 0}, ArchitectureError, "embed_dim"),
        ({"embed_dim": True}, ArchitectureError, "embed_dim"),
        ({"embed_dim": 10**9}, ArchitectureError, "'embed_dim' beyond"),
        ({"vision_cfg": None}, ArchitectureError, "no dictionary 'vision_cfg'"),
        ({"text_cfg": []}, ArchitectureError, "no dictionary 'text_cfg'"),
        ({"vision_cfg": {"layers": [3, 4, 10**6]}}, ArchitectureError, "'layers' = 1000000"),
        ({"vision_cfg": {"width": 1e300}}, ArchitectureError, "'width' beyond"),
        ({"vision_cfg": {"mlp_ratio": float("inf")}}, ArchitectureError, "'mlp_ratio' beyond"),
        (
            {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}},
            UnsafeCheckpointError,
            "trust_remote",
        ),
        (
            {"vision_cfg": {"timm_model_name": "hf-hub:evil/x"}},
            UnsafeCheckpointError,
            "hf-hub:evil/x",
        ),
        ({"vision_cfg": [{"timm_model_name": "hf-hub:evil/x"}]}, ArchitectureError, "vision_cfg"),
        ({"x": [{"hf_tokenizer_name": "https://evil"}]}, UnsafeCheckpointError, "https://evil"),
    ],
    ids=str,
)
def test_dangerous_configurations(
    mini_config: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_model_config({**mini_config, **change})


@pytest.mark.parametrize(
    "config", [None, {}, {"mean": [0, 0, 0], "std": (1.0, 1, 1)}, {"mean": 0.5, "std": 0.5}]
)
def test_good_preprocessing(config: object) -> None:
    check_preprocess_config(config)


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"mean": [0, 0]},
        {"std": [0.5, 0, 0.5]},
        {"std": [1, 1, float("nan")]},
        {"mean": [0, 0, "0"]},
        {"mean": [0, 0, 10**400]},
        {"mean": [[[[[[[[[[0]]]]]]]]]]},
        {"mean": "abc"},
        {"mean": True},
    ],
)
def test_bad_preprocessing(config: object) -> None:
    with pytest.raises(ArchitectureError, match="preprocess_cfg"):
        check_preprocess_config(config)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_finite(dtype: torch.dtype) -> None:
    good = {
        "a": torch.ones(3).to(dtype),
        "b": torch.empty(0, dtype=dtype),
        "i": torch.tensor([1, 2]),
    }
    check_finite(good)
    bad = torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]]).to(dtype)
    with pytest.raises(ArchitectureError, match=r"'bad': 2 of its 4 weights .*\(2 of 5 tensors"):
        check_finite({**good, "bad": bad, "also": bad[0]})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_check_finite_finds_one_in_many(value: float) -> None:
    tensor = torch.randn(1000, 33, generator=torch.Generator().manual_seed(0))
    tensor[517, 5] = value
    with pytest.raises(ArchitectureError, match="1 of its 33000"):
        check_finite({"a": tensor.t()})


def test_describe_mismatch() -> None:
    expected = {"a": (1, 2), "b": (3,), "c": (), "d": (4,), "e": (5,)}
    assert describe_mismatch(expected, dict(expected)) is None
    assert (
        describe_mismatch(expected, {name: list(shape) for name, shape in expected.items()}) is None
    )
    assert describe_mismatch(expected, {"a": (2, 1), "x\n": (1,)}) == (
        "the weights do not fit the architecture (5 tensors): 4 missing ('b', 'c', 'd', …); "
        "1 unexpected ('x\\n'); 1 of another shape ('a' [2, 1] instead of [1, 2])"
    )
    assert describe_mismatch({"a": (1,)}, {"a": torch.Size([1])}) is None
