"""The cost of stage 2 compared with plain training: python bench/stage2.py [--quick] [--json PATH]

cached over labels      images/s with the archive over images/s with cross-entropy alone; same loader, same student
cached over online      images/s with the archive over images/s with the teacher beside the student, and the share of
                        (T + S) / S that is reached; T and S are the seconds of teacher and student for the same images
cohort of four          seconds of four students in one pass over seconds of one
many views over few     images/s, and peak memory, with an archive of 16 views over one of 2

The runs that are compared alternate, and a ratio is the median of the ratios of neighbouring runs, because the speed of
a machine drifts. The first epoch is not counted: workers start, kernels are chosen. Labels over labels shows how far a
ratio can be trusted: it should be 1. Batches are of 128, the default of `redistill train`. JPEG images are 500 x 375;
rendered at 64 px for a small student, the loader is the limit.
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
from redistill_cache import Archive

from redistill.caching import CacheOptions, cache_teacher
from redistill.devices import pick_device
from redistill.models import open_model
from redistill.optim import OptimConfig
from redistill.sources.open_source import open_source
from redistill.teachers import Teacher
from redistill.training import TrainOptions, train

CLASSES = 10
TEACHER = f"demo:large?num_classes={CLASSES}&weights=random"
WIDE = "demo:large?num_classes=1000&weights=random"  # float16 rows of 2 kB, so that views in memory show in the peak
LARGE, SMALL = f"torchvision:resnet50?num_classes={CLASSES}&weights=random", "torchvision:resnet18"
DRAWN = f"synthetic?classes={CLASSES}"


class Bench:
    """Archives and runs in a temporary folder."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.runs = 0
        self.device = pick_device("auto")

    def jpegs(self, count: int) -> str:
        """A folder of images with the size and detail of photographs: synthetic images, enlarged, with noise."""
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

    def pace(self, data: str, archive: Path, streamed: Archive | None = None, **changed: object) -> float:
        """Images/s over all epochs but the first. Those of single epochs vary: the loader prefetches across epochs."""
        self.runs += 1
        out = self.folder / f"run-{self.runs}"
        plain = {
            "data": data,
            "archive": archive,
            "students": ("demo:small",),
            "out": out,
            "optim": OptimConfig(lr=0.01, epochs=3 if self.quick else 6),
            "log": ("csv",),
        }
        train(TrainOptions(**(plain | changed)), archive=streamed)  # type: ignore[arg-type]  # a table of options
        (metrics,) = [*out.glob("metrics.csv"), *sorted(out.glob("*/metrics.csv"))[:1]][:1]
        lines = [line.split(",") for line in metrics.read_text().splitlines()]
        pace, seconds = (lines[0].index(name) for name in ("images_per_second", "seconds"))
        epochs = [(float(line[pace]), float(line[seconds])) for line in lines[2:]]
        return sum(pace * seconds for pace, seconds in epochs) / sum(seconds for _, seconds in epochs)

    def peak(self, data: str, archive: Path) -> int:
        """Peak memory of a run in a process of its own."""
        self.runs += 1
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            return alone.submit(peak_of_run, self, data, archive).result()

    def compare(self, one: dict[str, object], other: dict[str, object], turns: int = 3) -> dict[str, float]:
        """Runs alternate, in both orders. The median of the ratios of images/s, and the median images/s of `one`."""
        pairs = []
        for turn in range(1 if self.quick else turns):
            order = -1 if turn % 2 else 1
            paces = [self.pace(**options) for options in [one, other][::order]]  # type: ignore[arg-type]  # a table
            pairs.append(paces[::order])
        return {
            "ratio": statistics.median(first / second for first, second in pairs),
            "images_per_second": statistics.median(first for first, _ in pairs),
        }


def peak_of_run(bench: Bench, data: str, archive: Path) -> int:
    bench.pace(data, archive)
    return harness.peak_memory()


def over_labels(bench: Bench, name: str, data: str, archive: Path, loss: str = "power") -> dict[str, object]:
    one, labels = ({"data": data, "archive": archive, "losses": (term,)} for term in (loss, "ce"))
    what = "labels" if loss == "ce" else "cached"
    return {"name": f"{what} over labels, {name}", "goal": 0.98, **bench.compare(one, labels, turns=5)}


def over_online(bench: Bench, name: str, data: str, archive: Path, size: int, **pair: str) -> dict[str, object]:
    common = {"data": data, "archive": archive, "students": (pair["student"],)}
    result = bench.compare(common, common | {"online_teacher": pair["teacher"]})
    limit = 1 + teacher_seconds(pair["teacher"], size, bench.device) * result["images_per_second"]
    share = result["ratio"] / limit
    return {"name": f"cached over online, {name}", "goal": 0.95, **result, "limit": limit, "share_of_limit": share}


def teacher_seconds(spec: str, size: int, device: torch.device) -> float:
    """Of one image, in batches of the size used in training."""
    teacher = Teacher(open_model(spec), device=device)
    pixels = torch.zeros(128, 3, size, size, dtype=torch.uint8)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        teacher(pixels)["logits"].sum().item()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:]) / len(pixels)


def cohort(bench: Bench, data: str, archive: Path) -> dict[str, object]:
    one = {"data": data, "archive": archive, "students": ("demo:tiny",)}
    result = bench.compare(one, one | {"seeds": (0, 1, 2, 3)})
    return {"name": "cohort of four over one, seconds", "goal": 2.0, **result}


def many_views(bench: Bench, data: str, few: Path, many: Path) -> list[dict[str, object]]:
    speed = bench.compare({"data": data, "archive": many}, {"data": data, "archive": few})
    memory = bench.peak(data, many) / bench.peak(data, few)
    return [
        {"name": "16 views over 2, images/s", "goal": 1.0, **speed},
        {"name": "16 views over 2, peak memory", "goal": 1.0, "ratio": memory},
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
        rows.append(over_labels(bench, "500 px JPEG at 64 px", jpeg, photos, "ce"))
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
