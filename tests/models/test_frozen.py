"""The frozen tower against open_clip's own module, architecture by architecture."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydetox.errors import UsageError
from pydetox.models import OpenClipModel
from pydetox.models.blocks import _Attention
from pydetox.models.frozen import (
    FrozenVisionTransformer,
    ModuleTower,
    TowerPair,
    freeze,
    obstacle,
    trainable,
)
from pydetox.models.towers import TimmTower
from pydetox.ops.reference import to_patch_rows
from tests.mini import MINI_CONFIG, mini_model

VISION = {"image_size": 24, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}

#: What open_clip's published vision transformers differ in, each alone; sizes are small.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick GELU": {"quick_gelu": True},
    "tanh GELU": {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}},
    "average pooling": {"vision_cfg": {"pool_type": "avg"}},
    "average pooling, norm after": {
        "vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}
    },
    "norm after the class token": {"vision_cfg": {"final_ln_after_pool": True}},
    "layer scale": {"vision_cfg": {"ls_init_value": 0.1}},
    "fixed positions": {"vision_cfg": {"pos_embed_type": "sin_cos_2d"}},
    "patch of 14": {"vision_cfg": {"image_size": 28, "patch_size": 14}},
    "one patch": {"vision_cfg": {"image_size": 8}},
    "one block": {"vision_cfg": {"layers": 1}},
    "one head": {"vision_cfg": {"head_width": 48}},
    "another epsilon": {"vision_cfg": {"norm_kwargs": {"eps": 1e-3}}},
    "wide MLP": {"vision_cfg": {"mlp_ratio": 4.9231}},
    "half precision in training": {"cast_dtype": torch.bfloat16},
}


def model_of(variant: dict[str, Any], seed: int = 0) -> OpenClipModel:
    config = copy.deepcopy(MINI_CONFIG) | {k: v for k, v in variant.items() if k != "vision_cfg"}
    config["vision_cfg"] = VISION | variant.get("vision_cfg", {})
    model = OpenClipModel.from_config(config, seed=seed)
    # Biases and norms start at 0 and 1, where a forgotten one would not show.
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.visual.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def pictures(model: OpenClipModel, count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, model.image_size, model.image_size, generator=generator)


def embeddings_and_gradient(tower, inputs):
    inputs = inputs.clone().requires_grad_()
    embeddings = tower(inputs)
    direction = torch.linspace(-1, 1, embeddings.numel(), dtype=embeddings.dtype)
    (gradient,) = torch.autograd.grad(embeddings, inputs, direction.view(embeddings.shape))
    return embeddings.detach(), gradient


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_module(name):
    model = model_of(VARIANTS[name])
    images = pictures(model)
    patch = model.visual.patch_size[0]
    rows = to_patch_rows(images, patch)
    truth = copy.deepcopy(model.visual).double()
    if hasattr(truth.ln_pre, "normalized_shape") and name == "half precision in training":
        truth = model.visual  # its norms go through float32: there is no float64 truth
    expected, gradient = embeddings_and_gradient(truth, images.to(next(truth.parameters()).dtype))
    gradient = to_patch_rows(gradient, patch)
    for precision, tolerance in (("float32", 2e-6), ("bfloat16", 3e-2)):
        tower = freeze(model.visual, precision)
        assert isinstance(tower, FrozenVisionTransformer)
        assert precision in tower.description
        found, found_gradient = embeddings_and_gradient(tower, rows.to(tower.dtype))
        assert found.dtype == torch.float32
        assert found_gradient.dtype == tower.dtype
        assert relative(found, expected) < tolerance
        assert relative(found_gradient, gradient) < tolerance


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trainable_tower_has_the_gradients_of_the_module(name):
    model = model_of(VARIANTS[name])
    images = pictures(model)
    truth = copy.deepcopy(model.visual)
    if name != "half precision in training":  # its norms go through float32
        truth = truth.double()

    def gradients(visual, embed, dtype):
        for parameter in visual.parameters():
            parameter.requires_grad_(True)
        given = images.to(dtype).requires_grad_()
        embeddings = embed(given)
        direction = torch.linspace(-1, 1, embeddings.numel(), dtype=dtype).view(embeddings.shape)
        (embeddings * direction).sum().backward()
        return {n: p.grad for n, p in visual.named_parameters()} | {"images": given.grad}

    expected = gradients(truth, truth, next(truth.parameters()).dtype)
    model.clip.train()
    with only_in_place(model.visual):
        found = gradients(model.visual, model.encode_normalized, torch.float32)
    assert found.keys() == expected.keys()
    whole = torch.cat([g.flatten().double() for g in expected.values() if g is not None]).norm()
    for key, gradient in expected.items():
        assert (found[key] is None) == (gradient is None), key
        if gradient is not None:
            # Of a bias that changes nothing, such as that of keys, rounding is all there is.
            error = (found[key].double() - gradient.double()).norm()
            assert error <= 2e-6 * whole + 2e-5 * gradient.double().norm(), key


@contextmanager
def only_in_place(visual):
    """Let the module itself fail, so that what was computed was computed without it."""

    def refuse(*_: object) -> None:
        raise AssertionError("the module ran")

    handle = visual.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def test_a_tower_that_drops_patches_is_trained_as_its_module():
    model = model_of({"vision_cfg": {"patch_dropout": 0.5}})
    assert isinstance(trainable(model.visual.eval()), FrozenVisionTransformer)
    assert trainable(model.visual.train()) is None
    assert trainable(torch.nn.Linear(2, 2)) is None
    assert trainable(model_of({}).visual.double()) is None


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-H-14"])
def test_published_architectures_can_be_frozen(name):
    """With one layer each: what differs between them is elsewhere."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = 1
    config["vision_cfg"]["image_size"] = 4 * config["vision_cfg"]["patch_size"]
    config["text_cfg"] = MINI_CONFIG["text_cfg"]
    model = OpenClipModel.from_config(config, seed=0)
    images = pictures(model, 2)
    expected, gradient = embeddings_and_gradient(model.visual, images)
    tower = freeze(model.visual)
    found, found_gradient = embeddings_and_gradient(tower, to_patch_rows(images, tower.patch_size))
    assert relative(found, expected) < 1e-5
    assert relative(found_gradient, to_patch_rows(gradient, tower.patch_size)) < 1e-5


def test_float32_follows_the_weights_bfloat16_is_a_copy():
    model = model_of({})
    rows = to_patch_rows(pictures(model), 8)
    following, copied = freeze(model.visual), freeze(model.visual, "bfloat16")
    before = following(rows), copied(rows.bfloat16())
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter *= 1.1
    assert relative(following(rows), before[0]) > 0.01
    assert torch.equal(copied(rows.bfloat16()), before[1])
    assert all(not p.requires_grad and p.grad is None for p in model.visual.parameters())


@pytest.mark.parametrize(
    ("vision", "why"),
    [
        ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, "ModifiedResNet"),
        ({"attentional_pool": True}, "pools by attention"),
        ({"qk_norm": True}, "not open_clip's plain ones"),
        ({"image_size": 36}, "images of 36 pixels are no whole number of patches of 8"),
    ],
)
def test_other_towers_run_as_they_are_and_say_so(vision, why):
    model = model_of({"vision_cfg": vision})
    tower = freeze(model.visual)
    assert isinstance(tower, ModuleTower)
    assert tower.patch_size is None
    assert why in tower.description
    images = pictures(model, 2)
    assert torch.equal(tower(images), model.visual(images))
    with torch.no_grad():
        assert torch.equal(model.encode_normalized(images), model.visual(images))
    with pytest.raises(UsageError, match=f"bfloat16 needs.*{why}"):
        freeze(model.visual, "bfloat16")


def test_unknown_precision():
    with pytest.raises(UsageError, match=r"'float16'; expected one of float32, bfloat16"):
        freeze(model_of({}).visual, "float16")


def test_obstacles_are_looked_for_in_every_block():
    tower = model_of({}).visual
    assert obstacle(tower) is None
    tower.transformer.resblocks[1].mlp.gelu = torch.nn.ReLU()
    assert obstacle(tower) == "its activation is ReLU"


def test_a_model_takes_the_fast_way():
    model = model_of({})
    images = pictures(model)
    expected = model.visual(images)
    assert relative(model.encode_normalized(images), expected) < 1e-6
    with torch.no_grad():
        found = model.encode_normalized(images)
        assert torch.equal(found, freeze(model.visual)(to_patch_rows(images, 8)))
    assert relative(found, expected) < 2e-6


class _Products(TorchDispatchMode):
    """Notes the shapes of matrix products."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            first = args[1] if func._overloadpacket is torch.ops.aten.addmm else args[0]
            self.rows.append(first.shape[0])
        assert func._overloadpacket not in (torch.ops.aten.bmm, torch.ops.aten.convolution)
        return func(*args, **(kwargs or {}))


def test_products_are_two_dimensional_and_the_last_block_is_short():
    model = model_of({})
    rows = to_patch_rows(pictures(model, 4), 8)
    with _Products() as products:
        freeze(model.visual)(rows)
    tokens = 4 * 10
    assert products.rows == [4 * 9] + 2 * 4 * [tokens] + [4, tokens, 4, 4, 4, 4]


@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 4), (1, 1, 3, 1, 3), (3, 7, 3, 1, 1)])
def test_attention_by_products(shape):
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    expected = expected.transpose(1, 2).flatten(2).flatten(0, 1)
    torch.testing.assert_close(_Attention.apply(parts), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(_Attention.apply, parts)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_estimate_covers_the_activations(precision):
    model = model_of({"vision_cfg": {"layers": 6, "image_size": 64}})
    tower = freeze(model.visual, precision)
    rows = to_patch_rows(pictures(model, 8), 8).to(tower.dtype).requires_grad_()
    kept = 0

    def keep(tensor):
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in weights:
            kept += tensor.nbytes
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.visual.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        tower(rows)
    assert 0.4 * 8 * tower.bytes_per_image < kept < 8 * tower.bytes_per_image


META_TOWER = {
    "image_size": 24,
    "patch_size": 8,
    "width": 48,
    "layers": 2,
    "heads": 3,
    "mlp_ratio": 4.0,
    "output_dim": 32,
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_reads_a_value_on_the_host(precision):
    """What does cannot be captured into a CUDA graph; meta tensors have no values to read."""
    with torch.device("meta"):
        tower = freeze(open_clip.transformer.VisionTransformer(**META_TOWER).eval(), precision)
        rows = torch.empty(5, 9, 192, dtype=tower.dtype, requires_grad=True)
        embeddings = tower(rows)
        (gradient,) = torch.autograd.grad(embeddings, rows, torch.ones_like(embeddings))
    assert embeddings.shape == (5, 32)
    assert gradient.shape == rows.shape
    assert gradient.dtype == tower.dtype


def test_a_pair_gives_both_embeddings_and_the_sum_of_both_gradients():
    one, two = (freeze(mini_model(seed).visual) for seed in (0, 1))
    pair = TowerPair(one, two)
    inputs = torch.randn(3, 4, 192, generator=torch.Generator().manual_seed(0), requires_grad=True)
    both = pair(inputs)
    torch.testing.assert_close(both, torch.cat([one(inputs), two(inputs)], dim=1))
    weights = torch.randn(both.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((both * weights).sum(), inputs)
    parts = torch.autograd.grad(
        (one(inputs) * weights[:, :16]).sum() + (two(inputs) * weights[:, 16:]).sum(), inputs
    )
    torch.testing.assert_close(gradient, parts[0])
    assert pair.bytes_per_image == one.bytes_per_image + two.bytes_per_image


def test_towers_with_other_inputs_make_no_pair():
    other = freeze(mini_model().visual, "bfloat16")
    with pytest.raises(UsageError, match=r"float32 \(patch size 8\) and torch.bfloat16"):
        TowerPair(freeze(mini_model().visual), other)


@pytest.mark.parametrize("name", ["quick", "layer scale"])
def test_factors_in_bfloat16_weights_are_as_exact_as_factors_beside_them(name):
    """Both against the module in float64: what rounding does to products of weights is no more."""
    vision = {"layers": 4, "image_size": 32, "width": 64}
    config = {"vision_cfg": vision, "quick_gelu": name == "quick"}
    if name == "layer scale":
        vision["ls_init_value"] = 0.3
    worse = []
    for seed in range(4):
        model = model_of(config, seed=seed)
        rows = to_patch_rows(pictures(model, 16), 8)
        truth = copy.deepcopy(model.visual).double()
        expected, gradient = embeddings_and_gradient(truth, pictures(model, 16).double())
        gradient = to_patch_rows(gradient, 8)
        folded = freeze(model.visual, "bfloat16")
        # The same weights without a factor inside: as they are where nothing has to be copied.
        beside = freeze(copy.deepcopy(model.visual).bfloat16(), "bfloat16")
        assert all(layer_factors(folded, 1.0))
        assert not all(layer_factors(beside, 1.0))
        errors = []
        for tower in (folded, beside):
            found, found_gradient = embeddings_and_gradient(tower, rows.bfloat16())
            errors.append(relative(found, expected) + relative(found_gradient, gradient))
        worse.append(errors[0] / errors[1])
    assert sum(worse) / len(worse) < 1.1


def layer_factors(tower, one):
    for block in tower._blocks:
        for layer in (block.project_out, block.expand, block.contract):
            yield layer.scale is None and (layer.input_factor, layer.output_factor) == (one, one)


def test_float32_weights_are_not_copied_for_a_factor():
    model = model_of({"quick_gelu": True})
    tower = freeze(model.visual)
    mlp = model.visual.transformer.resblocks[0].mlp
    assert tower._blocks[0].expand.weight.data_ptr() == mlp.c_fc.weight.data_ptr()
    assert tower._blocks[0].expand.output_factor == 1.702


def siglip(layout: str = "siglip", **changes: object) -> OpenClipModel:
    """A tiny model of SigLIP's kind, whose weights are none of a beginning's."""
    vision = {
        "image_size": 24,
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "mlp_ratio": 2.5,
        "activation": "gelu_pytorch_tanh",
        "epsilon": 1e-6,
    }
    text = {"context_length": 8, "vocab_size": 30, "width": 32, "heads": 1, "layers": 1}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    config = {"embed_dim": 32, "layout": layout, "vision_cfg": vision | changes, "text_cfg": text}
    model = OpenClipModel.from_config(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.visual.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_siglips_tower_equals_its_module_with_its_gradient(activation: str, layers: int) -> None:
    model = siglip(activation=activation, layers=layers)
    tower = freeze(model.visual)
    assert tower.patch_size == 8
    assert tower.description.startswith("frozen vision transformer of SigLIP, float32")
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    images.requires_grad_()
    theirs = model.visual(images)
    (their_gradient,) = torch.autograd.grad(theirs.square().sum(), images)
    ours = tower(to_patch_rows(images, 8))
    (our_gradient,) = torch.autograd.grad(ours.square().sum(), images)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-4, rtol=1e-3)
    half = freeze(model.visual, "bfloat16")
    rows = to_patch_rows(images.detach(), 8).bfloat16()
    assert float(torch.cosine_similarity(half(rows), theirs).min()) > 0.99


def test_the_kernel_of_siglips_pooling_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*_: object, **__: object) -> None:
        raise AssertionError("torch chooses a kernel in this call")

    tower = freeze(siglip().visual)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", theirs)
    monkeypatch.setattr("pydetox.models.attention.scaled_dot_product_attention", theirs)
    rows = torch.randn(2, 9, 192, requires_grad=True)
    tower(rows).sum().backward()
    assert rows.grad is not None
    bare = freeze(siglip(layers=0).visual)
    assert "FlashAttention for CPUs" in bare.description


def test_other_towers_of_timm_run_through_their_module() -> None:
    assert obstacle(siglip(activation="quick_gelu").visual) == "its activation is QuickGELU"
    trunk = timm.create_model("test_vit", num_classes=0)
    assert obstacle(TimmTower(trunk)) == "it does not pool by attention, as SigLIP does"
    trunk = timm.create_model("test_resnet", num_classes=0)
    assert "not a vision transformer" in str(obstacle(TimmTower(trunk)))
