import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

import pydetox
from pydetox.checkpoints import Checkpoint, Provenance, load_checkpoint, save_checkpoint
from pydetox.errors import ArchitectureError, CheckpointError, DataError
from pydetox.models import OpenClipModel, tokenizers
from pydetox.models.open_clip_model import HeadMemo
from pydetox.repair.subtraction import subtract
from pydetox.repair.task_vectors import TaskVector
from pydetox.session import as_model
from tests.mini import CLASS_NAMES, MINI_CONFIG, mini_images, mini_model
from tests.pretended import PretendedGpu


def save(model, folder, state=None, **changes):
    return save_checkpoint(
        folder,
        state or model.storage_state_dict(),
        model_config=MINI_CONFIG | changes,
        preprocess_config={"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        provenance=Provenance(method="test"),
    )


def test_heads_are_shared_only_by_models_with_one_tokenizer():
    config = MINI_CONFIG | {"text_cfg": MINI_CONFIG["text_cfg"] | {"hf_tokenizer_name": "any"}}
    memo, heads = HeadMemo(), []
    for number, content in enumerate((b"one", b"two", b"one")):
        model = OpenClipModel.from_config(config, seed=0)
        model.companions, model.heads = {"tokenizer.json": content}, memo
        tokens = torch.zeros(1, config["text_cfg"]["context_length"], dtype=torch.int64)
        tokens[0, 0] = number  # the third tokenizer is not asked
        model.tokenize = lambda prompts, tokens=tokens: tokens
        heads.append(model.zero_shot_head(["cat"], ["{}"]))
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_a_saved_model_reads_back_and_agrees_with_open_clip(tmp_path):
    model = mini_model()
    folder = save(model, tmp_path / "m")
    twin = OpenClipModel.from_checkpoint(load_checkpoint(folder))
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = mini_images(5).images.float() / 255
    shift = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    scale = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs.eval().encode_image((pixels - shift) / scale)
    torch.testing.assert_close(twin.encode_pixels(pixels), expected)
    assert twin.mean == (0.5, 0.4, 0.3)
    assert twin.num_parameters == sum(p.numel() for p in theirs.parameters())
    assert not any(p.requires_grad for p in twin.clip.parameters())
    assert not twin.clip.training


def test_zero_shot_head_against_open_clip():
    model = mini_model()
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    rows = []
    for name in CLASS_NAMES:
        tokens = tokenizer([f"a {name}", f"one {name}!"])
        with torch.no_grad():
            units = model.clip.encode_text(tokens, normalize=True)
        rows.append(normalize(units.mean(dim=0), dim=0))
    head = model.zero_shot_head(CLASS_NAMES, ["a {c}", "one {}!"])
    torch.testing.assert_close(head, torch.stack(rows))
    with pytest.raises(DataError, match="at least one"):
        model.zero_shot_head(CLASS_NAMES, [])


def test_models_of_one_context_length_share_a_tokenizer(monkeypatch):
    made = []

    class Counting(open_clip.SimpleTokenizer):
        def __init__(self, **options):
            made.append(options["context_length"])
            super().__init__(**options)

    monkeypatch.setattr(tokenizers, "SimpleTokenizer", Counting)
    tokenizers._plain.cache_clear()
    first = mini_model(1).tokenize(["a ship"])
    assert torch.equal(mini_model(2).tokenize(["a ship"]), first)
    assert made == [8]
    tokenizers._plain.cache_clear()


def test_random_weights_depend_on_the_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = mini_model(1), mini_model(1), mini_model(2)
    assert torch.equal(torch.rand(1), expected)
    key = "visual.conv1.weight"
    assert torch.equal(one.clip.state_dict()[key], two.clip.state_dict()[key])
    assert not torch.equal(one.clip.state_dict()[key], other.clip.state_dict()[key])


def test_half_precision_files_keep_their_dtype_and_what_is_tested_is_what_is_saved(tmp_path):
    model = mini_model()
    half = {k: v.to(torch.float16) for k, v in model.clip.state_dict().items()}
    twin = OpenClipModel.from_checkpoint(load_checkpoint(save(model, tmp_path / "m", half)))
    change = TaskVector({k: torch.full_like(v, 1e-3) for k, v in twin.clip.state_dict().items()})
    repaired = subtract(twin, change, 0.7)
    saved = repaired.storage_state_dict()
    assert {v.dtype for v in saved.values()} == {torch.float16}
    for key, value in repaired.clip.state_dict().items():
        torch.testing.assert_close(value, twin.clip.state_dict()[key] - 7e-4, atol=1e-3, rtol=1e-3)
        assert torch.equal(value, saved[key].float()), key


ARCHITECTURES = {
    "plain": MINI_CONFIG,
    "custom text": MINI_CONFIG | {"custom_text": True},
    "convolutions": MINI_CONFIG
    | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}},
    "timm": MINI_CONFIG
    | {"vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg"}}
    | {"custom_text": True},
}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_what_is_read_is_what_was_built_buffers_too(tmp_path, config):
    model = OpenClipModel.from_config(config, seed=3)
    folder = save(model, tmp_path / "m", **config)
    for consume in (False, True):
        checkpoint = load_checkpoint(folder)
        twin = OpenClipModel.from_checkpoint(checkpoint, consume=consume)
        assert twin.clip.state_dict().keys() == model.clip.state_dict().keys()
        for name, value in twin.clip.state_dict().items():
            assert torch.equal(value, model.clip.state_dict()[name]), name
            taken = value.data_ptr() == checkpoint.state_dict[name].data_ptr()
            assert taken == (consume and value.numel() > 0), name
        buffers = dict(twin.clip.named_buffers())
        assert buffers.keys() == dict(model.clip.named_buffers()).keys()
        for name, value in model.clip.named_buffers():
            assert torch.equal(buffers[name], value), name
        assert not any(p.requires_grad for p in twin.clip.parameters())
        pixels = torch.rand(2, 3, twin.image_size, twin.image_size)
        assert torch.equal(twin.visual(pixels), model.visual(pixels))


def test_tensors_that_share_memory_or_have_another_dtype_are_copied_even_if_taken(tmp_path):
    model = mini_model()
    state = model.storage_state_dict()
    key, half = "visual.proj", "visual.ln_pre.weight"
    whole = torch.stack([state[key], state[key] + 1])
    checkpoint = replace(
        load_checkpoint(save(model, tmp_path / "m")),
        state_dict=state | {key: whole[0], half: state[half].half()},
    )
    twin = OpenClipModel.from_checkpoint(checkpoint, consume=True)
    assert torch.equal(twin.clip.state_dict()[key], whole[0])
    assert twin.clip.state_dict()[key].data_ptr() != whole.data_ptr()
    assert twin.clip.state_dict()[half].dtype == torch.float32
    assert twin.storage_dtypes[half] == torch.float16
    tied = state["visual.ln_pre.bias"]
    both = {"visual.ln_pre.bias": tied, "visual.ln_post.bias": tied}
    model = OpenClipModel.from_checkpoint(
        replace(checkpoint, state_dict=state | both), consume=True
    )
    addresses = {model.clip.state_dict()[name].data_ptr() for name in both}
    assert len(addresses) == 2
    assert tied.data_ptr() not in addresses
    turned = state[key].T.contiguous().T
    strided = replace(checkpoint, state_dict=state | {key: turned})
    taken = OpenClipModel.from_checkpoint(strided, consume=True).clip.state_dict()[key]
    assert taken.is_contiguous()
    assert torch.equal(taken, state[key])


def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path):
    model = mini_model()
    state = model.storage_state_dict()
    del state["visual.proj"]
    state["surprise"] = torch.ones(1)
    state["visual.ln_pre.weight"] = torch.ones(3)
    checkpoint = load_checkpoint(save(model, tmp_path / "m", state))
    with pytest.raises(ArchitectureError) as caught:
        OpenClipModel.from_checkpoint(checkpoint)
    message = str(caught.value)
    for name in ("visual.proj", "surprise", "visual.ln_pre.weight"):
        assert name in message
    assert "\n" not in message


def test_entries_of_openais_archives_that_are_no_weights_are_left_out(tmp_path):
    model = mini_model()
    state = model.storage_state_dict() | {"context_length": torch.tensor(8)}
    twin = OpenClipModel.from_checkpoint(load_checkpoint(save(model, tmp_path / "m", state)))
    assert twin.image_size == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"image_size": [16, 24]}}, "square"),
        ({"text_cfg": {"hf_model_name": "org/x"}}, "transformers"),
        ({"vision_cfg": {"no_such_option": 1}}, "no_such_option"),
    ],
)
def test_architectures_that_cannot_be_used_are_refused(change, message):
    config = copy.deepcopy(MINI_CONFIG)
    for part, values in change.items():
        config[part].update(values)
    with pytest.raises(ArchitectureError, match=message):
        OpenClipModel.from_config(config, seed=0)


def test_small_vocabularies_and_other_tokenizers_are_refused_by_the_text_tower_only():
    config = copy.deepcopy(MINI_CONFIG)
    config["text_cfg"]["vocab_size"] = 100
    model = OpenClipModel.from_config(config, seed=0)
    assert model.encode_pixels(torch.rand(2, 3, 16, 16)).shape == (2, 16)
    with pytest.raises(ArchitectureError, match="vocabulary of 100"):
        model.tokenize(["a"])
    config["text_cfg"]["hf_tokenizer_name"] = "org/x"
    model = OpenClipModel.from_config(config, seed=0)
    with pytest.raises(ArchitectureError, match="org/x"):
        model.tokenize(["a"])


def test_images_of_another_size_are_refused():
    with pytest.raises(DataError, match="expects"):
        mini_model().encode_pixels(torch.rand(2, 3, 15, 16))


def test_a_clone_has_weights_of_its_own():
    model = mini_model()
    twin = model.clone()
    with torch.no_grad():
        next(twin.clip.parameters()).add_(1)
    same = torch.equal(next(twin.clip.parameters()), next(model.clip.parameters()))
    assert not same


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(dtype):
    model = mini_model()
    state = {k: v.clone() for k, v in model.clip.state_dict().items()}
    state["visual.conv1.weight"] = (100 * state["visual.conv1.weight"]).to(dtype)
    given = Checkpoint(state, model.model_config, None, "quantised", Path("q.pt"), "", "torch")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ArchitectureError, match=f"'visual.conv1.weight' is stored as {kind}"):
        OpenClipModel.from_checkpoint(given)


def test_no_door_takes_a_file_of_which_loaders_take_other_weights(tmp_path):
    model = mini_model()
    state, other = model.clip.state_dict(), mini_model(seed=1).clip.state_dict()
    torch.save({"state_dict": state, "state_dict_ema": other}, tmp_path / "two.pt")
    (tmp_path / "config.json").write_text(json.dumps(model.model_config))
    config = str(tmp_path / "config.json")
    for take in (as_model, pydetox.scan):
        arguments = [] if take is as_model else [mini_images(4)]
        with pytest.raises(CheckpointError, match=r"two\.pt: .*pydetox convert"):
            take(tmp_path / "two.pt", *arguments, architecture=config)
    chosen = load_checkpoint(tmp_path / "two.pt", model=config, weights_key="state_dict_ema")
    kept = OpenClipModel.from_checkpoint(chosen).clip.state_dict()
    assert torch.equal(kept["visual.proj"], other["visual.proj"])


def test_coca_is_read_through_its_image_tower_and_text_encoder(tmp_path):
    config = copy.deepcopy(MINI_CONFIG)
    config["vision_cfg"] |= {
        "attentional_pool": True,
        "attn_pooler_heads": 1,
        "output_tokens": True,
    }
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    config["multimodal_cfg"] = {
        "attn_pooler_heads": 1,
        "context_length": 8,
        "vocab_size": 49408,
        "width": 16,
        "heads": 1,
        "layers": 1,
    }
    torch.manual_seed(0)
    theirs = open_clip.CoCa(**config).eval()
    # open_clip leaves this one to whatever the memory held, which may be NaN.
    torch.nn.init.normal_(theirs.text_decoder.text_projection)
    save_checkpoint(
        tmp_path / "coca",
        theirs.state_dict(),
        model_config=config | {"custom_text": True},
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    ours = OpenClipModel.from_checkpoint(load_checkpoint(tmp_path / "coca"))
    pixels = torch.randn(2, 3, 16, 16)
    tokens = ours.tokenize(["a ship", "two ships"])
    with torch.no_grad():
        images = normalize(ours.encode_normalized(pixels), dim=-1)
        texts = normalize(ours.encode_tokens(tokens), dim=-1)
        assert torch.allclose(images, theirs.encode_image(pixels), atol=1e-5)
        assert torch.allclose(texts, theirs.encode_text(tokens), atol=1e-5)
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'coca'}")
    assert isinstance(again, open_clip.CoCa)


def test_a_head_takes_few_passes_through_the_text_tower_and_is_that_of_each_class(monkeypatch):
    model, names = mini_model(), [f"thing {k}" for k in range(20)]
    templates = [f"a {{c}} number {k}" for k in range(8)]
    passes = []
    encode = model.clip.encode_text
    monkeypatch.setattr(
        model.clip, "encode_text", lambda tokens: passes.append(len(tokens)) or encode(tokens)
    )
    head = model.zero_shot_head(names, templates)
    assert passes == [128, 32]
    for name, row in zip(names, head, strict=True):
        torch.testing.assert_close(model.zero_shot_head([name], templates)[0], row)


def test_a_head_goes_on_with_fewer_prompts_where_memory_runs_out(monkeypatch):
    model, encode = mini_model(), mini_model().clip.encode_text
    expected = model.zero_shot_head(["cat", "dog"], ["a {c}", "the {c}"] * 10)

    def small(tokens):
        if len(tokens) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return encode(tokens)

    monkeypatch.setattr(model.clip, "encode_text", small)
    found = model.zero_shot_head(["cat", "dog"], ["a {c}", "the {c}"] * 10)
    torch.testing.assert_close(found, expected)


def test_a_text_tower_on_a_gpu_is_not_copied_back_to_be_hashed():
    with PretendedGpu() as gpu:
        model, memo = mini_model(), HeadMemo()
        model.share_heads(memo)
        model.to("cuda")
        for _ in range(3):
            head = model.zero_shot_head(["cat", "dog"], ["a {c}"])
        assert gpu.syncs == []
        alone = mini_model().to("cuda").zero_shot_head(["cat", "dog"], ["a {c}"])
        assert torch.equal(head.cpu(), alone.cpu())


def test_a_clone_hashes_its_own_text_tower():
    model = mini_model()
    model.share_heads(HeadMemo())
    twin = model.clone()
    twin.clip.token_embedding.weight += 1
    twin.share_heads(model.heads)
    names = ["cat", "dog"], ["a {c}"]
    assert not torch.equal(model.zero_shot_head(*names), twin.zero_shot_head(*names))


def test_images_are_sent_as_bytes():
    images = mini_images(20).images
    with PretendedGpu() as gpu:
        model = mini_model().to("cuda")
        gpu.sent = 0
        pixels = model.pixels(images)
        assert gpu.sent == images.nbytes
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels.cpu(), mini_model().pixels(images))


def test_nothing_makes_floats_of_images_before_it_sends_them():
    """`images.to(device, torch.float32)` converts on the host: four times the bytes."""
    pattern = re.compile(r"\.to\([^()]*,\s*(dtype=)?torch\.float32\)\s*/\s*255")
    sources = Path(pydetox.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if pattern.search(path.read_text("utf-8"))] == []
