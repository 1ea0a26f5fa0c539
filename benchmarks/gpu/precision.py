"""TF32 in prediction and training: the time it takes, and what it changes."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from pydetox import ImageSet
from pydetox.evaluation import predict
from pydetox.prototypes import image_features
from pydetox.training import TrainConfig, train_on_prompts

from .library import random_model, without_tf32
from .recorder import Session
from .timing import once

NAMES = ("tf32", "float32")


def measure(session: Session) -> None:
    """Record both precisions; on a CPU they are the same."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    counts = (64, 64, 64) if session.tiny else (2048, 640, 256)
    pixels, shown, few = (
        session.images(count, 3, model.image_size, model.image_size) for count in counts
    )
    head = normalize(session.randn(10, model.embed_dim), dim=-1)
    names = tuple(f"thing {k}" for k in range(10))
    data = ImageSet(shown.cpu(), torch.arange(len(shown)) % 10, names)
    config = TrainConfig(epochs=1, learning_rate=1e-5, batch_size=64)
    answers, features = [], []
    for name in NAMES:
        with without_tf32(name == "float32"):
            image_features(model, few)  # a warm-up
            seconds = once(lambda: answers.append(predict(model, pixels, head)), session.device)
            session.record(f"{name}.predict_images_per_second", len(pixels) / seconds)
            features.append(image_features(model, few).double())
            train = once(lambda: train_on_prompts(model, data, ["a {c}"], config), session.device)
            session.record(f"{name}.train_images_per_second", len(data) / train)
    off = (features[0] - features[1]).norm(dim=1)
    session.record("tf32.features_off", float(off.max()))
    session.record("tf32.predictions_changed", float((answers[0] != answers[1]).double().mean()))
