"""Use the kernels of pydetox without a checkpoint and without open_clip.

First a small trigger search: eight triggers at once against a linear classifier. Then a comparison
of models by the differences of their weights.

    python examples/operators.py
"""

from __future__ import annotations

import torch

from pydetox.ops import apply_task_vectors, stamp_triggers, weight_diff_gram, weight_diff_sketch


def search(steps: int = 60) -> tuple[float, float]:
    """Search eight triggers for a random classifier; return the success before and after."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    classifier = torch.randn(3 * 32 * 32, 8, generator=generator) / 55
    targets = torch.arange(8)

    # Logits: a mask of -2 covers 2% of each pixel, a pattern of 0 is grey.
    masks = torch.full((8, 32, 32), -2.0, requires_grad=True)
    patterns = torch.zeros(8, 3, 32, 32, requires_grad=True)
    optimizer = torch.optim.Adam([masks, patterns], lr=0.2)
    success = []
    for _ in range(steps):
        stamped = stamp_triggers(images, masks, patterns)  # [8, 16, 3, 32, 32]
        logits = stamped.flatten(2) @ classifier  # [8, 16, 8]
        wanted = targets[:, None].expand(-1, 16)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        success.append((logits.argmax(-1) == wanted).float().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return success[0], success[-1]


def main() -> None:
    """Run the search, then compare three models with their base."""
    before, after = search()
    print(f"triggers that reach their class: {before:.0%} before, {after:.0%} after")

    generator = torch.Generator().manual_seed(1)
    base = [torch.randn(768, 256, generator=generator), torch.randn(768, generator=generator)]
    step = [torch.randn_like(weight) for weight in base]
    models = [
        [b + scale * s for b, s in zip(base, step, strict=True)] for scale in (0.1, 0.2, -0.1)
    ]
    gram = weight_diff_gram(base, models)  # float64 [3, 3]
    lengths = gram.diagonal().sqrt()
    print("cosines between the models' differences to the base:")
    print((gram / lengths[:, None] / lengths).round(decimals=3))

    sketch = weight_diff_sketch(base, models[0], ["weight", "bias"], seed=0)  # 4,096 numbers
    print(f"length of the first difference: {lengths[0]:.2f}, of its sketch: {sketch.norm():.2f}")

    # base + 0.5 (models[0] - base): half of the way.
    vector = [m - b for m, b in zip(models[0], base, strict=True)]
    (half,) = apply_task_vectors(base, [vector], torch.tensor([[0.5]]))
    print(f"half of the way: {(half[0] - base[0]).norm() / vector[0].norm():.3f}")


if __name__ == "__main__":
    main()
