"""A folder of images for imports, and the logits that another program might have of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES, PER_CLASS = 5, 6


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders c0 to c4 with six PNG images each, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(3)
    for label in range(CLASSES):
        (root / f"c{label}").mkdir()
        for number in range(PER_CLASS):
            height, width = 40 + 3 * number, 36 + 5 * label
            pixels = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(root / f"c{label}" / f"i{label}{number}.png")
    return root


@pytest.fixture(scope="session")
def keys(images: Path) -> list[str]:
    return sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))


@pytest.fixture(scope="session")
def logits(keys: list[str]) -> np.ndarray:
    """float32 [N, 5], right for most of the images."""
    rng = np.random.default_rng(4)
    rows = rng.normal(0, 2, (len(keys), CLASSES)).astype(np.float32)
    rows[np.arange(len(keys)), [int(key[1]) for key in keys]] += 4
    return rows
