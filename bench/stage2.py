"""What stage 2 costs beside plain training: python bench/stage2.py [--quick] [--json PATH]

cached over labels      images/s with the archive over images/s with cross-entropy alone; the same loader and student
cached over online      images/s with the archive over images/s with the teacher beside the student, and what share that
                        is of (T + S) / S, where T and S are the seconds of teacher and student for the same images
cohort of four          seconds of four students in one pass over seconds of one
many views over few     images/s, and peak memory, from an archive of 16 views over one of 2

Runs take turns, the first epoch of each (workers start, kernels are chosen) is not counted, and ratios are of medians.
Batches are of 128, as `redistill train` makes them. JPEG images are 500 x 375; rendered at 64 px for a small student,
the loader is what limits.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
WIDE = "demo:large?num_classes=1000&weights=random"  # float16 rows of 2 kB: an archive that is resident whole is seen
LARGE, SMALL = f"torchvision:resnet50?num_classes={CLASSES}&weights=random", "torchvision:resnet18"
DRAWN = f"synthetic?classes={CLASSES}"


class Bench:
    """Archives and runs in a temporary folder."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.runs = 0
        self.device = pick_device("auto")

    def jpegs(self, count: int) -> str:
        """A folder of photographs' size and detail, drawn and enlarged."""
        root, source = self.folder / f"jpeg-{count}", open_source(f"{DRAWN}&n={count}&size=96")
        noise = np.random.default_rng(0)
        for i in range(count):
            sample = source.sample(i)
            image = Image.fromarray(np.asarray(sample.payload)).resize((500, 375), Image.Resampling.BICUBIC)
            pixels = np.asarray(image).astype(np.int16) + noise.integers(-12, 13, (375, 500, 3), np.int16)
            path = root / f"{sample.label}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        return f"folder:{root}"

    def archive(self, name: str, data: str, views: int, **options: str) -> Path:
        path = self.folder / f"{name}.redistill.zarr"
        plain = {"data": data, "teacher": TEACHER, "views": views, "out": path, "recipe": "cifar"}
        cache_teacher(CacheOptions(**(plain | options)))  # type: ignore[arg-type]  # a table of options
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
            "optim": OptimConfig(lr=0.01, epochs=3 if self.quick else 4),
            "log": ("csv",),
        }
        train(TrainOptions(**(plain | changed)))  # type: ignore[arg-type]  # a table of options
        (metrics,) = [*out.glob("metrics.csv"), *sorted(out.glob("*/metrics.csv"))[:1]][:1]
        lines = [line.split(",") for line in metrics.read_text().splitlines()]
        column = lines[0].index("images_per_second")
        return statistics.median(float(line[column]) for line in lines[2:])

    def peak(self, data: str, archive: Path) -> int:
        """The most memory that a process of its own takes for a run."""
        self.runs += 1
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            return alone.submit(peak_of_run, self, data, archive).result()

    def in_turns(self, *kinds: dict[str, object]) -> list[float]:
        """The median pace of each kind of run, all of them taking turns."""
        paces: list[list[float]] = [[] for _ in kinds]
        for _ in range(1 if self.quick else 5):
            for kind, found in zip(kinds, paces, strict=True):
                found.append(self.pace(**kind))  # type: ignore[arg-type]  # a table of options
        return [statistics.median(found) for found in paces]


def peak_of_run(bench: Bench, data: str, archive: Path) -> int:
    bench.pace(data, archive)
    return harness.peak_memory()


def over_labels(bench: Bench, name: str, data: str, archive: Path) -> dict[str, object]:
    cached, labels = bench.in_turns(
        {"data": data, "archive": archive, "losses": ("power",)}, {"data": data, "archive": archive, "losses": ("ce",)}
    )
    return {"name": f"cached over labels, {name}", "ratio": cached / labels, "goal": 0.98, "images_per_second": cached}


def over_online(bench: Bench, name: str, data: str, archive: Path, size: int, **pair: str) -> dict[str, object]:
    common = {"data": data, "archive": archive, "students": (pair["student"],)}
    cached, online = bench.in_turns(common, common | {"online_teacher": pair["teacher"]})
    limit = (teacher_seconds(pair["teacher"], size, bench.device) + 1 / cached) * cached
    return {
        "name": f"cached over online, {name}",
        "ratio": cached / online,
        "limit": limit,
        "share_of_limit": cached / online / limit,
        "goal": 0.95,
        "images_per_second": cached,
    }


def teacher_seconds(spec: str, size: int, device: torch.device) -> float:
    """Of one image, in batches as they are in training."""
    teacher = Teacher(open_model(spec), device=device)
    pixels = torch.zeros(128, 3, size, size, dtype=torch.uint8)
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
    return [
        {"name": "16 views over 2, images/s", "ratio": slow / fast, "goal": 1.0, "images_per_second": slow},
        {"name": "16 views over 2, peak memory", "ratio": bench.peak(data, many) / bench.peak(data, few), "goal": 1.0},
    ]


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.quick)
        drawn = f"{DRAWN}&n={2000 if args.quick else 6000}"
        few = bench.archive("few", drawn, 2)
        jpeg, fewer = bench.jpegs(300 if args.quick else 1200), bench.jpegs(200 if args.quick else 400)
        photos = bench.archive("photos", jpeg, 2, recipe="rrc?size=64")
        rows = [over_labels(bench, "32 px drawn", drawn, few)]
        rows.append(over_labels(bench, "500 px JPEG at 64 px", jpeg, photos))
        large = bench.archive("large", fewer, 2, recipe="rrc?size=224")
        rows.append(over_labels(bench, "500 px JPEG at 224 px", fewer, large))
        rows.append(
            over_online(bench, "demo:large to demo:small", drawn, few, 32, teacher=TEACHER, student="demo:small")
        )
        deep = bench.archive("deep", fewer, 2, recipe="rrc?size=64", teacher=LARGE)
        rows.append(over_online(bench, "ResNet-50 to ResNet-18", fewer, deep, 64, teacher=LARGE, student=SMALL))
        rows.append(cohort(bench, jpeg, photos))
        wide = f"synthetic?classes=1000&n={1000 if args.quick else 4000}"
        rows += many_views(
            bench, wide, *(bench.archive(f"wide-{v}", wide, v, teacher=WIDE, codec="float16") for v in (2, 16))
        )
    harness.report("stage2", rows, args)


if __name__ == "__main__":
    main()
