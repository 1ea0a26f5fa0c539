"""The CUDA kernels on a GPU: the bits of the CPU kernels, which other tests hold to the truth."""

import pytest
import torch

from pydetox import ops
from pydetox.errors import UsageError
from pydetox.ops import (
    BestTriggers,
    embedding_collapse,
    stamp_triggers,
    stamp_triggers_gradients,
    trigger_update,
    weight_diff_matmul,
    zero_shot_loss,
)
from pydetox.ops.weights import matrix_shape

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("patch_size", [None, 2, 14])
@pytest.mark.parametrize(
    ("images_dtype", "dtype", "output"),
    [
        (torch.uint8, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (19, 3), (70, 5)])
def test_gpu_and_cpu_agree_to_the_bit(
    images_dtype: torch.dtype,
    dtype: torch.dtype,
    output: torch.dtype,
    batch: int,
    channels: int,
    patch_size: int | None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, channels, 42, 28), generator=generator)
    images = (
        pixels.to(torch.uint8) if images_dtype == torch.uint8 else (pixels / 255).to(images_dtype)
    )
    mask = torch.randn(3, 42, 28, generator=generator).to(dtype)
    pattern = torch.randn(3, channels, 42, 28, generator=generator).to(dtype)
    options = {
        "mean": [0.1 * c for c in range(channels)],
        "std": [0.2 + 0.1 * c for c in range(channels)],
        "patch_size": patch_size,
        "dtype": output,
    }
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (mask, pattern)]
        stamped = stamp_triggers(images.to(device), *leaves, **options)
        upstream = torch.randn(stamped.shape, generator=generator.manual_seed(1)).to(stamped)
        gradients = torch.autograd.grad(stamped, leaves, upstream)
        results.append([t.detach().cpu() for t in (stamped, *gradients)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_of_differences_agree_to_the_bit(dtype: torch.dtype, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(768, 3072), (65, 7, 3, 3), (1, 130), (9,), (0, 4)]
    base, model = (
        [torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(2)
    )
    depths = [matrix_shape(t)[side == "right"] for t in base]
    factors = [torch.randn(depth, 33, dtype=torch.float64, generator=generator) for depth in depths]
    on_cpu = weight_diff_matmul(base, model, factors, side=side)
    on_gpu = weight_diff_matmul(
        *([t.cuda() for t in tensors] for tensors in (base, model, factors)), side=side
    )
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(a, b.cpu())


def test_the_current_stream_is_used() -> None:
    images = torch.zeros(64, 3, 224, 224, device="cuda")
    mask = torch.zeros(8, 224, 224, device="cuda")
    pattern = torch.zeros(8, 3, 224, 224, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        images.fill_(1)
        stamped = stamp_triggers(images, mask, pattern)
    stream.synchronize()
    assert torch.all(stamped == 0.75)


@pytest.mark.parametrize("patch_size", [None, 14])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("box", [None, (17, 9)])
def test_boxes_and_own_images_agree_to_the_bit(
    box: tuple[int, int] | None, own: bool, patch_size: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 9, 3, 42, 28) if own else (9, 3, 42, 28)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rows, columns = box or (42, 28)
    mask = torch.randn(3, rows, columns, generator=generator)
    pattern = torch.randn(3, 3, rows, columns, generator=generator)
    corners = None if box is None else torch.tensor([(0, 19), (25, 0), (7, 3)])
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (mask, pattern)]
        places = None if corners is None else corners.to(device)
        stamped = stamp_triggers(images.to(device), *leaves, patch_size=patch_size, corners=places)
        upstream = torch.randn(stamped.shape, generator=generator.manual_seed(1)).to(stamped)
        gradients = torch.autograd.grad(stamped, leaves, upstream)
        results.append([t.detach().cpu() for t in (stamped, *gradients)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)


def test_a_graph_is_replayed_with_other_corners() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=generator).cuda()
    mask = torch.randn(2, 5, 7, generator=generator).cuda()
    pattern = torch.randn(2, 3, 5, 7, generator=generator).cuda()
    corners = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    gradient = torch.randn(2, 4, 3, 32, 32, generator=generator).cuda()
    out, buffers = torch.empty_like(gradient), (torch.empty_like(mask), torch.empty_like(pattern))

    def step() -> None:
        stamp_triggers(images, mask, pattern, corners=corners, out=out)
        stamp_triggers_gradients(gradient, images, mask, pattern, corners=corners, out=buffers)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for given, moved in (([(1, 2), (20, 9)], None), ([(-3, 99), (0, 0)], [(0, 25), (0, 0)])):
        corners.copy_(torch.tensor(given))
        graph.replay()
        inside = moved or given
        assert torch.equal(out, stamp_triggers(images, mask, pattern, corners=inside))
        expected = stamp_triggers_gradients(gradient, images, mask, pattern, corners=inside)
        assert all(map(torch.equal, buffers, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_objectives_agree(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 7, 300, dtype=dtype, generator=generator)
    head = torch.nn.functional.normalize(torch.randn(130, 300, generator=generator), dim=-1)
    targets = torch.tensor([0, 129, 64, 3, 77])
    results = []
    for device in ("cpu", "cuda"):
        leaf = z.to(device).requires_grad_()
        cosine = embedding_collapse(leaf)
        loss, success = zero_shot_loss(leaf, head.to(device), targets.to(device), 20.0)
        gradients = [torch.autograd.grad(value.sum(), leaf)[0] for value in (cosine, loss)]
        results.append(
            [t.detach().cpu() for t in (cosine, gradients[0], loss, success, *gradients)]
        )
    for on_cpu, on_gpu in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(on_cpu, on_gpu)
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optional", [False, True])
def test_updates_agree_to_the_bit(dtype: torch.dtype, optional: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 67, 71), (4, 3, 67, 71))
    state = [[torch.randn(s, dtype=dtype, generator=generator) for s in shapes] for _ in range(5)]
    state[3] = [t.square() for t in state[3]]
    vector = torch.linspace(0.1, 0.4, 4)
    results = []
    for device in ("cpu", "cuda"):
        logits, gradients, first, second, kept = (
            (mask.to(device, copy=True), pattern.to(device, copy=True)) for mask, pattern in state
        )
        factors = vector.to(device)
        steps = torch.arange(4, device=device)
        smallest = torch.tensor([torch.inf, torch.inf, 0, 1e9], device=device).double()
        eligible = torch.tensor([True, False, True, True], device=device)
        norms = trigger_update(
            logits,
            gradients,
            first,
            second,
            cost=factors,
            learning_rate=factors,
            steps=steps,
            active=torch.tensor([True, True, True, False], device=device),
            betas=(0.5, 0.9),
            total_variation=factors if optional else None,
            best=BestTriggers(kept, smallest, eligible) if optional else None,
        )
        written = (norms.nan_to_num(), steps, smallest, *logits, *first, *second, *kept)
        results.append([t.cpu() for t in written])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)


def test_errors_of_the_cpu_library_arrive() -> None:
    # Beside the next test: a build whose exceptions end the process shows here which library it is.
    with pytest.raises(UsageError, match="mask_logits must be"):
        stamp_triggers(torch.zeros(2, 3, 4, 4), torch.zeros(1, 5, 4), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("name", ["mask_logits", "pattern_logits"])
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    given = {
        "images": torch.zeros(2, 3, 4, 4),
        "mask_logits": torch.zeros(1, 4, 4),
        "pattern_logits": torch.zeros(1, 3, 4, 4),
    }
    given = {key: tensor.to("cpu" if key == name else "cuda") for key, tensor in given.items()}
    with pytest.raises(UsageError, match=f"{name} must be on cuda:0 as images is, found cpu"):
        stamp_triggers(**given)
    base = [torch.zeros(3, device="cuda")]
    with pytest.raises(UsageError, match=r"model\[0\] must be on cuda:0 as base\[0\] is"):
        ops.weight_diff_project(base, [torch.zeros(3)], [])


def test_corners_on_the_cpu_are_checked_and_copied() -> None:
    images = torch.rand(2, 3, 8, 8, device="cuda")
    mask, pattern = torch.randn(2, 3, 3, device="cuda"), torch.randn(2, 3, 3, 3, device="cuda")
    corners = torch.tensor([[0, 5], [2, 1]])
    expected = stamp_triggers(images, mask, pattern, corners=corners.cuda())
    for given in (corners, corners.tolist()):
        assert torch.equal(stamp_triggers(images, mask, pattern, corners=given), expected)
    with pytest.raises(UsageError, match=r"corners\[1\] is \(6, 1\)"):
        stamp_triggers(images, mask, pattern, corners=[(0, 5), (6, 1)])


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("sizes", [(3, 131, 70), (130, 5000, 96)])
def test_searches_for_tokens_have_the_bits_of_the_cpu(
    sizes: tuple[int, int, int], dtype: torch.dtype, stored: torch.dtype
) -> None:
    rows, tokens, dim = sizes
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, tokens, generator=generator).to(dtype)
    table = torch.randn(tokens, dim, generator=generator).to(stored)
    gradient = torch.randn(rows, dim, generator=generator).to(dtype)
    allowed = torch.rand(tokens, generator=generator) < 0.7
    results = []
    for device in ("cpu", "cuda"):
        given = (table.to(device), 0.7, allowed.to(device))
        leaf = logits.to(device).requires_grad_()
        mixed = ops.mix_tokens(leaf, *given)
        (slope,) = torch.autograd.grad(mixed, leaf, gradient.to(device))
        state = [leaf.detach().clone(), torch.zeros_like(slope), torch.ones_like(slope)]
        places = torch.arange(rows, device=device)
        steps = places.clone()
        ops.mix_tokens_update(
            gradient.to(device),
            ops.mix_tokens_forward(state[0], *given),
            *state,
            *given,
            learning_rate=0.1 + places.float(),
            steps=steps,
            active=places % 3 != 1,
            betas=(0.5, 0.9),
        )
        swaps = ops.top_swaps(gradient.to(device), given[0], places, given[2], 50)
        results.append([t.detach().cpu() for t in (mixed, slope, *state, steps, *swaps)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
