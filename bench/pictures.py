"""Generated pictures with the spectrum and the edges of photographs, so that nothing is downloaded."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

__all__ = ["jpeg", "picture"]

FULL, QUARTER = 0, 2  # Pillow's chroma subsampling: 4:4:4 and 4:2:0


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A uint8 image [height, width, 3]: coloured 1/f noise under some soft and some hard discs."""
    random = np.random.default_rng(seed)
    noise = [_noise(random, height, width, random.uniform(0.9, 1.7)) for _ in range(3)]
    luma = random.uniform(80, 170) + random.uniform(20, 60) * noise[0]
    strength = random.uniform(5, 30)
    blue, red = (strength * (0.5 * one + 0.2 * noise[0]) for one in noise[1:])
    pixels = np.stack([luma + 1.40 * red, luma - 0.34 * blue - 0.71 * red, luma + 1.77 * blue], axis=-1)
    y, x = np.mgrid[:height, :width]
    for _ in range(random.integers(0, 6)):
        centre_y, centre_x, radius = random.uniform(0, height), random.uniform(0, width), random.uniform(4, height / 3)
        inside = np.clip(radius - np.hypot(y - centre_y, x - centre_x) + 0.5, 0, 1) * random.uniform(0.5, 1)
        pixels += inside[..., None] * (random.uniform(0, 255, 3) - pixels)
    return pixels.clip(0, 255).astype(np.uint8)


def _noise(random: np.random.Generator, height: int, width: int, slope: float) -> np.ndarray:
    """Noise whose amplitude falls with frequency ** slope; unit variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * frequency**-slope, (height, width))
    return noise / noise.std()


def jpeg(pixels: np.ndarray, quality: int = 90, subsampling: int = QUARTER) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=subsampling)
    return out.getvalue()
