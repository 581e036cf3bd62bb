"""What stage 2 costs beside plain training: python bench/stage2.py [--quick] [--json PATH]

cached over labels      images/s with the archive over images/s with cross-entropy alone; the same loader and student
cached over online      images/s with the archive over images/s with the teacher beside the student, and what share that
                        is of (T + S) / S, where T and S are the seconds of teacher and student for the same images
cohort of four          seconds of four students in one pass over seconds of one
many views over few     images/s, and peak memory, from an archive of 16 views over one of 2

Runs take turns, the first epoch of each (workers start, kernels are chosen) is not counted, and ratios are of medians.
JPEG images are 500 x 375 and rendered at 64 px: the loader is then what limits.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image

from redistill.caching import CacheOptions, cache_teacher
from redistill.devices import pick_device
from redistill.models import open_model
from redistill.optim import OptimConfig
from redistill.sources.opening import open_source
from redistill.teachers import Teacher
from redistill.training import TrainOptions, train

CLASSES = 10
TEACHER = f"demo:large?num_classes={CLASSES}&weights=random"
DRAWN = f"synthetic?classes={CLASSES}"


class Bench:
    """Archives and runs in a temporary folder."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.runs = 0
        self.device = pick_device("auto")

    def jpegs(self, count: int) -> str:
        """A folder of photographs' size and detail, drawn and enlarged."""
        root, source = self.folder / "jpeg", open_source(f"{DRAWN}&n={count}&size=96")
        noise = np.random.default_rng(0)
        for i in range(count):
            sample = source.sample(i)
            image = Image.fromarray(np.asarray(sample.payload)).resize((500, 375), Image.Resampling.BICUBIC)
            pixels = np.asarray(image).astype(np.int16) + noise.integers(-12, 13, (375, 500, 3), np.int16)
            path = root / f"{sample.label}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        return f"folder:{root}"

    def archive(self, name: str, data: str, views: int, recipe: str = "cifar") -> Path:
        path = self.folder / f"{name}.redistill.zarr"
        cache_teacher(CacheOptions(data=data, teacher=TEACHER, views=views, out=path, recipe=recipe))
        return path

    def pace(self, data: str, archive: Path, **changed: object) -> float:
        """Images a second of an epoch after the first."""
        self.runs += 1
        out = self.folder / f"run-{self.runs}"
        plain = {
            "data": data,
            "archive": archive,
            "students": ("demo:small",),
            "out": out,
            "batch_size": 64,
            "optim": OptimConfig(lr=0.01, epochs=3 if self.quick else 4),
            "log": ("csv",),
        }
        train(TrainOptions(**(plain | changed)))  # type: ignore[arg-type]  # a table of options
        (metrics,) = [*out.glob("metrics.csv"), *sorted(out.glob("*/metrics.csv"))[:1]][:1]
        lines = [line.split(",") for line in metrics.read_text().splitlines()]
        column = lines[0].index("images_per_second")
        return statistics.median(float(line[column]) for line in lines[2:])

    def in_turns(self, *kinds: dict[str, object]) -> list[float]:
        """The median pace of each kind of run, all of them taking turns."""
        paces: list[list[float]] = [[] for _ in kinds]
        for _ in range(1 if self.quick else 3):
            for kind, found in zip(kinds, paces, strict=True):
                found.append(self.pace(**kind))  # type: ignore[arg-type]  # a table of options
        return [statistics.median(found) for found in paces]


def over_labels(bench: Bench, name: str, data: str, archive: Path) -> dict[str, object]:
    cached, labels = bench.in_turns(
        {"data": data, "archive": archive, "losses": ("power",)}, {"data": data, "archive": archive, "losses": ("ce",)}
    )
    return {"name": f"cached over labels, {name}", "ratio": cached / labels, "goal": 0.98, "images_per_second": cached}


def over_online(bench: Bench, data: str, archive: Path) -> dict[str, object]:
    cached, online = bench.in_turns(
        {"data": data, "archive": archive}, {"data": data, "archive": archive, "online_teacher": TEACHER}
    )
    teacher = teacher_seconds(bench.device)
    limit = (teacher + 1 / cached) * cached
    return {
        "name": "cached over online",
        "ratio": cached / online,
        "limit": limit,
        "share_of_limit": cached / online / limit,
        "goal": 0.95,
        "images_per_second": cached,
    }


def teacher_seconds(device: torch.device) -> float:
    """Of one image, in batches as they are in training."""
    teacher = Teacher(open_model(TEACHER), device=device)
    pixels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        teacher(pixels)["logits"].sum().item()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:]) / len(pixels)


def cohort(bench: Bench, data: str, archive: Path) -> dict[str, object]:
    tiny = ("demo:tiny",)
    one, four = bench.in_turns(
        {"data": data, "archive": archive, "students": tiny},
        {"data": data, "archive": archive, "students": tiny, "seeds": (0, 1, 2, 3)},
    )
    return {"name": "cohort of four over one, seconds", "ratio": one / four, "goal": 2.0, "images_per_second": four}


def many_views(bench: Bench, data: str, few: Path, many: Path) -> list[dict[str, object]]:
    slow, fast = bench.in_turns({"data": data, "archive": many}, {"data": data, "archive": few})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bench.pace(data, many)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        {"name": "16 views over 2, images/s", "ratio": slow / fast, "goal": 1.0, "images_per_second": slow},
        {"name": "16 views over 2, peak memory", "ratio": grown / peak, "goal": 1.0},
    ]


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.quick)
        drawn = f"{DRAWN}&n={2000 if args.quick else 6000}"
        few, many = bench.archive("few", drawn, 2), bench.archive("many", drawn, 16)
        jpeg = bench.jpegs(300 if args.quick else 1200)
        photos = bench.archive("photos", jpeg, 2, "rrc?size=64")
        rows = [over_labels(bench, "32 px drawn", drawn, few)]
        rows.append(over_labels(bench, "500 px JPEG at 64 px", jpeg, photos))
        rows.append(over_online(bench, drawn, few))
        rows.append(cohort(bench, jpeg, photos))
        rows += many_views(bench, drawn, few, many)
    harness.report("stage2", rows, args)


if __name__ == "__main__":
    main()
