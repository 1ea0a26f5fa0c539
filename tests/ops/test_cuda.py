"""The CUDA kernels on a GPU: the bits of the CPU kernels, which other tests hold to the truth."""

import pytest
import torch

from pydetox.ops import stamp_triggers

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
