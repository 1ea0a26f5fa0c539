import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pydetox.checkpoints.index import FileIndex, WeightsFile
from pydetox.errors import DataError
from pydetox.scanning.weights import Reference, suspicion


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(33, 70, generator=generator),
        "half": torch.randn(129, generator=generator).to(torch.float16),
        "scalar": torch.randn((), generator=generator),
        "steps": torch.tensor([seed]),
    }


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[k].double().flatten() for k in ("large", "half", "scalar")])


def test_against_plain_float64(tmp_path: Path) -> None:
    base, weights, vector = tensors(0), tensors(1), tensors(2)
    del vector["steps"]
    save_file(vector, tmp_path / "known.safetensors")
    reference = Reference.of(base, [str(tmp_path / "known.safetensors")])
    found = reference.relation(weights)
    difference = flat(weights) - flat(base)
    assert found["norm"] == pytest.approx(float(difference.norm()), rel=1e-12)
    assert found["relative"] == pytest.approx(float(difference.norm() / flat(base).norm()))
    shares = {one["name"]: one["share"] for one in found["layers"]}
    part = (weights["large"].double() - base["large"].double()).square().sum()
    assert shares["large"] == pytest.approx(float(part / difference.square().sum()))
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert list(shares) == sorted(shares, key=shares.__getitem__, reverse=True)
    expected = torch.nn.functional.cosine_similarity(difference, flat(vector), dim=0)
    (known,) = found["known"]
    assert known["cosine"] == pytest.approx(float(expected))


def test_a_vector_of_some_tensors(tmp_path: Path) -> None:
    base = tensors(0)
    known = {"half": torch.ones(129)}
    save_file(known, tmp_path / "known.safetensors")
    reference = Reference.of(base, [str(tmp_path / "known.safetensors")])
    moved = base | {"half": base["half"] + 1}
    (one,) = reference.relation(moved)["known"]
    assert one["cosine"] == pytest.approx(1, abs=1e-3)
    (none,) = reference.relation(base)["known"]
    assert none["cosine"] is None


def test_the_base_itself_and_another_architecture() -> None:
    reference = Reference.of(tensors(0))
    same = reference.relation(tensors(0))
    assert same == {"norm": 0.0, "relative": 0.0, "distance": None, "layers": [], "known": []}
    other = tensors(0) | {"large": torch.zeros(2, 2)}
    assert "large" in reference.relation(other)["mismatch"]


@pytest.mark.parametrize("content", [{}, {"other": torch.zeros(2)}, {"half": torch.zeros(2)}])
def test_vectors_that_do_not_fit(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "known.safetensors"
    save_file(content, path)
    with pytest.raises(DataError, match=r"known\.safetensors"):
        Reference.of(tensors(0), [str(path)])
    with pytest.raises(DataError, match="nothing"):
        Reference.of(tensors(0), [str(tmp_path / "nothing")])


def test_the_order_of_the_queue() -> None:
    near = {"relative": 0.1, "known": []}
    far = {"relative": 0.2, "known": []}
    like = {"relative": 0.0, "known": [{"cosine": None}, {"cosine": 0.5}]}
    unlike = {"relative": 0.3, "known": [{"cosine": -0.9}]}
    given = [None, near, {"mismatch": "x"}, far, like, unlike]
    assert sorted(given, key=suspicion, reverse=True)[:4] == [like, unlike, far, near]


def test_vectors_are_indexed_in_the_sandbox(tmp_path: Path) -> None:
    """What a parser does to itself happens in a child: docs/threat-model.md."""
    from pydetox.checkpoints import sandbox

    path = tmp_path / "known.safetensors"
    save_file({"half": torch.ones(129)}, path)
    indexed = []
    real = sandbox.Sandbox.index

    def index(
        self: sandbox.Sandbox, file: WeightsFile, weights_key: str | None = None
    ) -> FileIndex:
        indexed.append(file.path)
        return real(self, file, weights_key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.Sandbox, "index", index)
        Reference.of(tensors(0), [str(path)])
    assert indexed == [str(path)]


def test_a_vector_of_which_loaders_take_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    torch.save(
        {"model": {"half": torch.ones(129)}, "model_ema": {"half": torch.ones(129) * 2}}, path
    )
    with pytest.raises(DataError, match=r"two\.pt: no weight vector: holds several sets"):
        Reference.of(tensors(0), [str(path)])
