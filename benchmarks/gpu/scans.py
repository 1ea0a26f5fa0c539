"""Whole scans: ten classes, both families of triggers, 150 steps, in bfloat16."""

from __future__ import annotations

import pydetox

from .library import noise_images, random_model, scan_config
from .recorder import Session
from .timing import once


def scan(session: Session, name: str, architecture: str, times: int) -> None:
    """Record the seconds of a scan; with `times` of two those of the second one as well."""
    model = random_model(architecture, session.device, tiny=session.tiny)
    classes = [f"thing {number}" for number in range(3 if session.tiny else 10)]
    images = noise_images(32 if session.tiny else 128, model.image_size, classes)
    config = scan_config("bfloat16", 3 if session.tiny else 150)
    for suffix in ("", "_again")[:times]:
        seconds = once(lambda: pydetox.scan(model, images, config=config), session.device)
        session.record(f"{name}.seconds{suffix}", seconds)


def vit_b32(session: Session) -> None:
    """Record ViT-B-32, the first scan of a process and the second."""
    scan(session, "scan_b32", "ViT-B-32", 2)


def vit_l14(session: Session) -> None:
    """Record ViT-L-14."""
    scan(session, "scan_l14", "ViT-L-14", 1)
