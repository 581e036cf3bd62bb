"""Rendering by the dataset compared with a hand-written torchvision v2 pipeline; the speed of drawing parameters.

Both pipelines decode the same bytes with Pillow, apply the same operations to uint8 tensors at the same size, and are
loaded by the same DataLoader; passes alternate, and the ratio is that of the medians (goal: at least 0.95).
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from harness import arguments, report
from pictures import jpeg, picture
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from redistill.sources.base import Sample
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.views import DrawnViews, ViewDataset, draw_params, parse_recipe

DISTINCT = 64  # encoded pictures, used repeatedly


class Encoded:
    """`count` samples that are JPEG files of about 110 kB, or 32-pixel arrays."""

    def __init__(self, count: int, kind: str) -> None:
        shapes = [(375, 500) if kind == "jpeg" else (32, 32)] * DISTINCT
        pictures = [picture(seed, *shape) for seed, shape in enumerate(shapes)]
        self.payloads = [jpeg(pixels, 92) if kind == "jpeg" else pixels for pixels in pictures]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int) -> Sample:
        return Sample(self.payloads[i % DISTINCT], i % 10, str(i))


class HandWritten(Dataset[Any]):
    """The usual dataset: decode, then a Compose of random transforms."""

    def __init__(self, source: Encoded, transform: v2.Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        payload = self.source.sample(i).payload
        image = Image.open(io.BytesIO(payload)).convert("RGB") if isinstance(payload, bytes) else payload
        return self.transform(image), i % 10, i


@dataclass
class PredrawnViews:
    """Parameters drawn beforehand and gathered per batch, as those of an archive are."""

    drawn: DrawnViews

    def __post_init__(self) -> None:
        self.recipe, self.num_views = self.drawn.recipe, 1
        self.labels, self.source_rows, self.digests = self.drawn.labels, self.drawn.source_rows, self.drawn.digests
        self.drawn_params = self.drawn.params(0, np.arange(len(self.source_rows)))

    def params(self, _: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[rows] for name, values in self.drawn_params.items()}


# Name, kind of samples, recipe, and the hand-written transforms.
PIPELINES: list[tuple[str, str, str, list[v2.Transform]]] = [
    (
        "224 px JPEG, rrc",
        "jpeg",
        "rrc",
        [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()],
    ),
    (
        "224 px JPEG, rrc + TrivialAugmentWide + erasing",
        "jpeg",
        "rrc?aa=ta_wide&reprob=0.25",
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(),
            v2.RandomErasing(0.25),
        ],
    ),
    (
        "32 px arrays, cifar",
        "arrays",
        "cifar",
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()],
    ),
    (
        "32 px arrays, cifar + RandAugment",
        "arrays",
        "cifar?aa=rand-m9-n2",
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.RandAugment()],
    ),
]


def images_per_second(dataset: Dataset[Any], workers: int) -> Callable[[], float]:
    """One pass over the dataset each time it is called; workers stay alive between passes."""
    loader = DataLoader(
        dataset, batch_size=128, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )

    def measure() -> float:
        started, count = time.perf_counter(), 0
        for batch in loader:
            count += len(batch[0])
        return count / (time.perf_counter() - started)

    return measure


def rendering(quick: bool) -> Iterator[dict[str, object]]:
    rounds = 3 if quick else 9
    for name, kind, text, transforms in PIPELINES:
        count = {"jpeg": 256, "arrays": 2560}[kind] * (1 if quick else 4)
        source = Encoded(count, kind)
        drawn = DrawnViews(index_source(open_source(source), workers=0), parse_recipe(text), seed=0, num_views=1)
        for workers in (0, 2):
            ours = images_per_second(ViewDataset(source, PredrawnViews(drawn)), workers)
            theirs = images_per_second(HandWritten(source, v2.Compose([v2.ToImage(), *transforms])), workers)
            pairs = [(ours(), theirs()) for _ in range(rounds + 1)][1:]  # the first pass warms up
            mine, hand = (statistics.median(column) for column in zip(*pairs, strict=True))
            yield {
                "name": f"{name}, {workers} workers",
                "ratio": mine / hand,
                "images_per_second": round(mine),
                "by_hand": round(hand),
            }


def drawing(quick: bool) -> Iterator[dict[str, object]]:
    n = 100_000 if quick else 1_000_000
    for text, size in (
        ("rrc", (375, 500)),
        ("cifar", (32, 32)),
        ("rrc?aa=rand-m9-n2&color_jitter=0.4&reprob=0.25&mixup=0.2&cutmix=1", (375, 500)),
    ):
        recipe, rows, sizes = parse_recipe(text), np.arange(n), np.tile(size, (n, 1))
        draw_params(recipe, 0, 0, rows[:100], sizes[:100], n)
        seconds = []
        for view in range(3):
            started = time.perf_counter()
            draw_params(recipe, 0, view, rows, sizes, n)
            seconds.append(time.perf_counter() - started)
        rate = n / statistics.median(seconds)
        yield {"name": f"drawing {text}", "ratio": rate / 1e6, "views_per_second": round(rate)}


def main() -> None:
    args = arguments("Rendering against a hand-written torchvision v2 pipeline, and drawing parameters.").parse_args()
    torch.set_num_threads(1)
    report("views", [*rendering(args.quick), *drawing(args.quick)], args)


if __name__ == "__main__":
    main()
