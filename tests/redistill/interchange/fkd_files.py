"""Writes folders in the layout of FKD, as its generator does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["FkdView", "write_fkd"]

CROPS = 4


class FkdView:
    """What is in the file of one image: boxes in pixels, flips, and probabilities of all classes."""

    def __init__(self, size: tuple[int, int], logits: np.ndarray, rng: np.random.Generator) -> None:
        height, width = size
        self.size = size
        sides = np.stack([rng.integers(8, height + 1, CROPS), rng.integers(8, width + 1, CROPS)], 1)
        corners = np.stack([rng.integers(0, height + 1 - sides[:, 0]), rng.integers(0, width + 1 - sides[:, 1])], 1)
        self.boxes = np.concatenate([corners, sides], 1)
        self.flip = rng.random(CROPS) < 0.5
        rows = logits + rng.normal(0, 0.5, (CROPS, len(logits)))
        exponentials = np.exp(rows - rows.max(1, keepdims=True))
        self.probabilities = exponentials / exponentials.sum(1, keepdims=True)

    def coords(self, dtype: str) -> np.ndarray:
        return (self.boxes.astype(np.float32) / np.tile(np.float32(self.size), 2)).astype(dtype)

    def labels(self, kind: str, dtype: str) -> np.ndarray:
        order = np.argsort(-self.probabilities, 1, kind="stable")
        if kind == "full":
            return self.probabilities.astype(dtype)
        if kind == "hard":
            return order[:, 0]
        kept = order[:, : {"marginal": 3, "renorm": 3, "smoothing": 1}[kind]]
        top = np.take_along_axis(self.probabilities, kept, 1)
        if kind == "renorm":
            top = top / top.sum(1, keepdims=True)
        pair = np.stack([kept, top], 1).astype(dtype)
        return pair[:, :, 0] if kind == "smoothing" else pair


def write_fkd(
    root: Path,
    images: Path,
    keys: list[str],
    logits: np.ndarray,
    *,
    kind: str = "marginal",
    dtype: str = "float32",
    tensors: bool = False,
    legacy: bool = False,
) -> dict[str, FkdView]:
    """root/train/CLASS/STEM.tar for every image; returns what they hold."""
    rng, views = np.random.default_rng(7), {}
    for key, row in zip(keys, logits, strict=True):
        with Image.open(images / key) as image:
            view = views[key] = FkdView((image.height, image.width), row, rng)
        content: list[Any] = [view.coords(dtype), view.flip, view.labels(kind, dtype)]
        path = root / "train" / Path(key).with_suffix(".tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = [torch.from_numpy(array) for array in content] if tensors else content
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return views
