"""Whether the alignment check distinguishes another decoder from another view: drift and verdict of every case.

Another decoder must pass; another interpolation, crop, image, quality or recipe must be refused. Decoders: Pillow (the
archive's), torchvision.io, Pillow with draft mode, chroma upsampled in three other ways from the chroma samples of
the file, and, where the package simplejpeg is installed, libjpeg-turbo's fast inverse DCT and fast upsampling.
"""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import torchvision
from harness import arguments, report
from pictures import FULL, QUARTER, jpeg, picture
from PIL import Image

from redistill.sources.base import Sample
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.views import DrawnViews, Recipe, ViewDataset, parse_recipe
from redistill.views.canaries import AlteredViews, align, canary_rows, fingerprints

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

SEED = 1
Decode = Callable[[bytes], np.ndarray]


# -- decoders ---------------------------------------------------------------------------------------------------------


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def by_torchvision(data: bytes) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torchvision 0.29 deprecates it
        decoded = torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
    return decoded.permute(1, 2, 0).numpy()


def by_draft(data: bytes) -> np.ndarray:
    """Draft mode at full size: another path through Pillow, the same pixels."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", image.size)
    return np.array(image.convert("RGB"))


def by_half_draft(data: bytes) -> np.ndarray:
    """Draft mode for a thumbnail: decoded at half the size and enlarged, which loses fine detail."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    image.draft("RGB", (width // 2, height // 2))
    return np.array(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def upsampling_chroma(how: Image.Resampling) -> Decode:
    """Luma as decoded; chroma as stored in the file (as a half-size decode returns it), enlarged by `how`."""

    def decode(data: bytes) -> np.ndarray:
        whole, small = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
        whole.draft("YCbCr", whole.size)
        small.draft("YCbCr", ((whole.width + 1) // 2, (whole.height + 1) // 2))
        luma = whole.split()[0]
        chroma = [channel.resize(whole.size, how) for channel in small.split()[1:]]
        return np.array(Image.merge("YCbCr", [luma, *chroma]).convert("RGB"))

    return decode


DECODERS: dict[str, Decode] = {
    "the same decoder": by_pillow,
    "torchvision.io": by_torchvision,
    "Pillow in draft mode": by_draft,
    "chroma upsampled: nearest": upsampling_chroma(Image.Resampling.NEAREST),
    "chroma upsampled: linear": upsampling_chroma(Image.Resampling.BILINEAR),
    "chroma upsampled: cubic": upsampling_chroma(Image.Resampling.BICUBIC),
}
if simplejpeg is not None:
    DECODERS |= {
        "libjpeg-turbo, fast DCT": lambda data: simplejpeg.decode_jpeg(data, fastdct=True),
        "libjpeg-turbo, fast upsampling": lambda data: simplejpeg.decode_jpeg(data, fastupsample=True),
        "libjpeg-turbo, both": lambda data: simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True),
    }


# -- data -------------------------------------------------------------------------------------------------------------


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """Without fine detail, like an enlarged or blurred photograph."""
    return np.array(Image.fromarray(picture(seed, height // 4, width // 4)).resize((width, height), Image.BICUBIC))


def large(seed: int, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(picture(seed, height // 2, width // 2)).resize((width, height), Image.BICUBIC))


KINDS: dict[str, tuple[Callable[[int, int, int], np.ndarray], int, int]] = {
    "photographs 240-600": (picture, 240, 600),
    "smooth 240-600": (smooth, 240, 600),
    "large 900-1400": (large, 900, 1400),
    "small 60-120": (picture, 60, 120),
    "tiny 32": (picture, 32, 33),
}
# Recipe and kind of pictures.
SETUPS = [
    ("rrc", "photographs 240-600"),
    ("rrc", "smooth 240-600"),
    ("rrc", "large 900-1400"),
    ("center", "large 900-1400"),
    ("rrc?size=64", "small 60-120"),
    ("rrc?aa=ta_wide&color_jitter=0.4,0.4,0.4,0.1&reprob=0.25", "photographs 240-600"),
    ("rrc?size=64&aa=rand-m15-n3&grayscale_prob=0.2", "small 60-120"),
    ("rrc?mixup=0.2&cutmix=1", "photographs 240-600"),
    ("cifar", "tiny 32"),
]
QUICK = [("rrc?size=64", "small 60-120"), ("rrc?mixup=0.2&cutmix=1&size=64", "small 60-120"), ("cifar", "tiny 32")]


class Encoded:
    """JPEG files of several qualities and chroma subsamplings."""

    def __init__(self, kind: str, count: int) -> None:
        draw, low, high = KINDS[kind]
        random = np.random.default_rng(7)
        self.files = []
        for seed in range(count):
            height, width = random.integers(low, high, 2)
            quality, subsampling = int(random.choice([75, 85, 90, 95])), int(random.choice([FULL, QUARTER, QUARTER]))
            self.files.append(jpeg(draw(seed, height, width), quality, subsampling))

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, i: int) -> tuple[bytes, int, str]:
        return self.files[i], 0, f"{i}.jpg"


@dataclass
class Decoded:
    """The same files after a decoder."""

    pixels: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.pixels)

    def sample(self, i: int) -> Sample:
        return Sample(self.pixels[i], 0, f"{i}.jpg")


# -- cases ------------------------------------------------------------------------------------------------------------


def accepted_cases(encoded: Encoded, views: DrawnViews) -> Iterator[tuple[str, ViewDataset]]:
    for name, decode in DECODERS.items():
        yield name, ViewDataset(Decoded([decode(data) for data in encoded.files]), views)


def refused_cases(encoded: Encoded, views: DrawnViews, kind: str) -> Iterator[tuple[str, ViewDataset]]:
    images = [by_pillow(data) for data in encoded.files]
    source, recipe = Decoded(images), views.recipe
    if recipe.crop.name != "random_crop@1":
        for interpolation, antialias in (("bicubic", True), ("bilinear", False), ("nearest", True)):
            other = replace(recipe, interpolation=interpolation, antialias=antialias)
            yield f"{interpolation}, antialias {antialias}", ViewDataset(source, AlteredViews(views, other))
    sizes = {i: image.shape[:2] for i, image in enumerate(images)}
    for nudge in ((1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0), (0, 0, 1, 1), (0, 0, -1, -1), (1, 1, -1, -1)):
        yield f"crop {nudge}", ViewDataset(source, AlteredViews(views, recipe, nudge, sizes))
    yield "mirrored", ViewDataset(Decoded([image[:, ::-1].copy() for image in images]), views)
    yield "shuffled", ViewDataset(Decoded(shuffled_where_sizes_allow(images)), views)
    yield "red and blue swapped", ViewDataset(Decoded([image[..., ::-1].copy() for image in images]), views)
    yield "JPEG quality 50", ViewDataset(Decoded([by_pillow(jpeg(image, 50)) for image in images]), views)
    for text in other_recipes(recipe, kind):
        altered = DrawnViews(index_source(open_source(encoded), workers=0), parse_recipe(text), seed=SEED, num_views=1)
        yield f"recipe {text}", ViewDataset(source, altered)
    reseeded = DrawnViews(index_source(open_source(encoded), workers=0), recipe, seed=SEED + 1, num_views=1)
    if recipe.crop.name != "center_crop@1":
        yield "another seed", ViewDataset(source, reseeded)


def shuffled_where_sizes_allow(images: list[np.ndarray]) -> list[np.ndarray]:
    """Every image replaced by another one's content, scaled to its size, so that the stored crops still fit."""
    others = images[1:] + images[:1]
    return [
        np.array(Image.fromarray(other).resize(image.shape[1::-1], Image.Resampling.BICUBIC))
        for image, other in zip(images, others, strict=True)
    ]


def other_recipes(recipe: Recipe, kind: str) -> Iterator[str]:
    size = recipe.size
    if recipe.crop.name == "random_crop@1":
        yield from ("cifar?padding=3", "cifar?color_jitter=0.1")
    elif recipe.crop.name == "center_crop@1":
        yield from (f"center?size={size}&crop_pct=0.9", f"center?size={size}&color_jitter=0.1")
    elif recipe == parse_recipe(f"rrc?size={size}"):
        yield from (f"rrc?size={size}&scale=0.09,1", f"rrc?size={size}&color_jitter=0,0,0.3")
        yield from (f"rrc?size={size}&reprob=0.25", f"rrc?size={size}&hflip=0.6")
        if "smooth" not in kind:  # another blur of a smooth image changes it less than another decoder
            yield f"rrc?size={size}&gaussian_blur_prob=0.5"
    else:
        yield f"rrc?size={size}"


def rows(setups: list[tuple[str, str]], count: int) -> Iterator[dict[str, object]]:
    for text, kind in setups:
        encoded = Encoded(kind, count)
        index = index_source(open_source(encoded), workers=0)
        views = DrawnViews(index, parse_recipe(text), seed=SEED, num_views=1)
        canaries = canary_rows(SEED, 0, count, count)
        stored = {0: (canaries, fingerprints(ViewDataset(encoded, views), 0, canaries))}
        for expected, cases in (
            ("passes", accepted_cases(encoded, views)),
            ("refused", refused_cases(encoded, views, kind)),
        ):
            for name, dataset in cases:
                started = time.perf_counter()
                alignment = align(dataset, stored)
                seconds = time.perf_counter() - started
                correct = (alignment.verdict == "refused") == (expected == "refused")
                yield {
                    "name": name,
                    "recipe": text,
                    "images": kind,
                    "expected": expected,
                    "verdict": alignment.verdict,
                    "drift": round(alignment.drift, 3),
                    "ratio": float(correct),
                    "seconds": round(seconds, 3),
                    "reason": alignment.reason,
                }


def main() -> None:
    args = arguments("Drift and verdict of the alignment check, case by case.").parse_args()
    torch.set_num_threads(1)
    cases = list(rows(QUICK if args.quick else SETUPS, 64))
    wrong = sum(case["ratio"] != 1.0 for case in cases)
    cases.append({"name": f"wrong verdicts of {len(cases)}", "ratio": wrong, "verdict": str(wrong)})
    report("canaries", cases, args)
    if simplejpeg is None:
        print("(simplejpeg is not installed: libjpeg-turbo's fast DCT and fast upsampling were not measured)")


if __name__ == "__main__":
    main()
