"""Acceptance on one GPU, in at most eight minutes: make gpu, or python bench/gpu.py [LOGITS.npz] [--quick]

Every check stands alone: one that fails, or raises, does not hide the others. The rows go to
bench/results/gpu-<device>.json; the exit code is 1 if a check fails, and 3 on a machine without a GPU.

tests       the quick tests of redistill and of the command line, with `--device auto`
losses      the power divergence relative to standard distillation, eager and compiled
encoder     logits as CUDA tensors, of 100, 1,000 and 10,000 classes: rows/s, peak memory, two encodes with equal bytes,
            and the bound of every row after decoding with numpy and on the GPU; LOGITS.npz as for bench/codecs.py
stage 1     ResNet-50 on pixels that are on the GPU, with blocks encoded and written beside it, over the same alone
archives    JPEGs through `redistill cache-teacher` with other workers, and after kill -9: one id, and verify --full
training    steps under torch.cuda.set_sync_debug_mode("error"): plain, mixed views, EMA, compiled
steps       a training step with labels alone over one with the archive (bench/steps.py)
precision   CachedTeacher under bfloat16 autocast: float32, and equal to numpy's decoding
resume      a run that was started on the CPU and interrupted goes on on the GPU
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import losses
import numpy as np
import steps
import torch
from redistill_cache import open_archive
from redistill_cache.codecs import fit_codec, join_encoded, kl_rows
from stage2 import CLASSES, DRAWN, Bench

import redistill
from redistill.caching import CacheOptions
from redistill.caching.encoder import BlockEncoder, RunStats
from redistill.caching.pilot import TeacherRunner, batches_of
from redistill.caching.plan import make_plan
from redistill.caching.run import declare_teacher
from redistill.interrupts import Interrupted, StopRequest
from redistill.optim import OptimConfig
from redistill.progress import NoProgress
from redistill.ranks import joined_world
from redistill.shares import Share
from redistill.training import TrainOptions, train
from redistill.training.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0
NO_GPU = "bench/gpu.py: expected a machine with a CUDA GPU, torch finds none; run it on one that has a GPU"
ENCODER_GOAL, STAGE1_GOAL, STEPS_GOAL = 10_000.0, 0.97, 0.98


@dataclass(frozen=True)
class Setting:
    """Where the checks run; `quick` is a tiny size, which only shows that they run."""

    device: torch.device
    folder: Path
    quick: bool
    logits: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def row(check: str, name: str, value: float | str, passed: bool, goal: str = "") -> harness.Row:
    return {"check": check, "name": name, "value": value, "goal": goal, "passed": passed}


# -- the checks -------------------------------------------------------------------------------------------------------


def tests(setting: Setting) -> Iterator[harness.Row]:
    folders = ["tests/redistill/test_metrics.py"] if setting.quick else ["tests/redistill", "tests/cli"]
    parallel = [] if setting.quick else ["-n", str(min(12, os.cpu_count() or 1))]
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *folders], 200)
    summary = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    yield row("tests", " ".join(folders), summary, done.returncode == 0)


def loss_speed(setting: Setting) -> Iterator[harness.Row]:
    for classes in (100,) if setting.quick else (100, 1000, 21_843):
        for mode in ("eager",) if setting.quick else ("eager", "compiled"):
            result = losses.measure("power", mode, classes, setting.device.type, 3 if setting.quick else 100)
            ratio, goal = float(result["ratio"]), losses.GOALS[mode]
            yield row("losses", f"{mode}, {classes} classes", ratio, setting.quick or ratio <= goal, f"<= {goal}")


def encoder(setting: Setting) -> Iterator[harness.Row]:
    for name, pilot, rows in logit_sets(setting):
        codec = fit_codec("linear", pilot)
        on_device = torch.from_numpy(rows).to(setting.device)
        codec.encode(on_device[:64])  # constants, compiled kernels
        if setting.cuda:
            torch.cuda.reset_peak_memory_stats(setting.device)
        setting.wait()
        start = time.perf_counter()
        first = join_encoded([codec.encode(on_device)])
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(setting.device) if setting.cuda else harness.peak_memory()
        rate, goal = len(rows) / seconds, ENCODER_GOAL if rows.shape[1] == 1000 else 0.0
        yield row("encoder", f"{name}: rows/s", rate, setting.quick or rate >= goal, f">= {goal:g}")
        yield row("encoder", f"{name}: peak memory, GiB", peak / 2**30, passed=True)
        second = join_encoded([codec.encode(on_device)])
        equal = all(np.array_equal(first.arrays[key], second.arrays[key]) for key in first.arrays)
        yield row("encoder", f"{name}: two encodes", "equal" if equal else "different", equal, "equal")
        arrays = {key: np.array(array) for key, array in first.arrays.items()}
        decoded = {
            "numpy": codec.decode(arrays),
            "device": codec.decode({k: torch.from_numpy(a).to(setting.device) for k, a in arrays.items()})
            .cpu()
            .numpy(),
        }
        for where, values in decoded.items():
            worst = max(float(kl_rows(rows, values, t).max()) for t in (1.0, 4.0))
            yield row("encoder", f"{name}: largest KL, decoded by {where}", worst, worst <= 1e-3, "<= 0.001")


def logit_sets(setting: Setting) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, rows to fit on, rows to encode): real ones if there are, else random ones with a decaying spectrum."""
    if setting.logits is not None:
        # By its path: `import codecs` is the module of the standard library.
        spec = importlib.util.spec_from_file_location("codecs_bench", ROOT / "bench" / "codecs.py")
        assert spec is not None
        assert spec.loader is not None
        bench = sys.modules["codecs_bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bench)
        for one in bench.sets_of(setting.logits, setting.quick):
            yield one.name, one.pilot, one.scored
            if one.name == "B":
                yield "B as bfloat16", one.pilot, torch.from_numpy(one.scored).bfloat16().float().numpy()
        return
    for classes, count in ((20, 200),) if setting.quick else ((100, 32_768), (1000, 16_384), (10_000, 2048)):
        rng = np.random.default_rng(0)
        rank = min(classes - 1, 512)
        basis = rng.normal(size=(rank, classes)) * (4.0 / np.arange(1, rank + 1) ** 0.8)[:, None]
        pilot, rows = ((rng.normal(size=(n, rank)) @ basis).astype(np.float32) for n in (min(2 * classes, 2048), count))
        yield f"{classes} classes", pilot, rows
        yield f"{classes} classes as bfloat16", pilot, torch.from_numpy(rows).bfloat16().float().numpy()


def stage1(setting: Setting) -> Iterator[harness.Row]:
    """The real encoder and writer, behind a teacher whose pixels are on the device already."""
    size, count, batch = (32, 64, 16) if setting.quick else (224, 16_384, 128)
    network = "demo:tiny?num_classes=10" if setting.quick else "torchvision:resnet50?num_classes=1000"
    classes = network.rpartition("=")[2]
    options = CacheOptions(
        data=f"synthetic?classes={classes}&size={size}&n={256 if not setting.quick else count}",
        teacher=f"{network}&weights=random",
        views=max(1, count // 256),
        recipe=f"rrc?size={size}",
        out=setting.folder / "stage1.zarr",
        batch_size=batch,
        device=str(setting.device),
    )
    plan = make_plan(options, Share())
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=setting.device)
    with TeacherRunner(plan, StopRequest()) as runner:
        stats = RunStats()
        writer = declare_teacher(runner, None, stats, NoProgress())
    blocks = writer.missing(plan.folder)
    batches = [(block, rows) for block in blocks for rows in batches_of(block.rows, batch)]

    def alone() -> None:
        for _, rows in batches:
            logits = plan.teacher(pixels[: len(rows)])["logits"]
        logits.sum().item()

    def beside() -> None:
        with BlockEncoder(plan, writer, stats) as encoder:
            for block, rows in batches:
                encoder.add(block, rows, plan.teacher(pixels[: len(rows)]))

    alone()
    seconds = []
    for work in (alone, beside, alone):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    ratio = (seconds[0] + seconds[2]) / 2 / seconds[1]
    yield row("stage 1", "teacher alone, images/s", sum(len(r) for _, r in batches) / seconds[0], passed=True)
    yield row("stage 1", "beside encoding and writing", ratio, setting.quick or ratio >= STAGE1_GOAL, ">= 0.97")
    control = seconds[0] / seconds[2]
    yield row("stage 1", "control, alone over alone", control, passed=True)
    complete = not writer.missing(plan.folder)
    yield row("stage 1", "all blocks are committed", str(complete), complete)


def archives(setting: Setting) -> Iterator[harness.Row]:
    bench = Bench(setting.folder, setting.quick)
    data, size = bench.jpegs(24 if setting.quick else 4096), 32 if setting.quick else 224
    network = "demo:tiny" if setting.quick else "torchvision:resnet50"
    command = [sys.executable, "-m", "redistill_cli", "cache-teacher", data, "--recipe", f"rrc?size={size}"]
    command += ["--teacher", f"{network}?num_classes={CLASSES}&weights=random", "--device", str(setting.device)]
    # Several blocks, so that some are committed before the process is killed.
    command += ["--block-rows", "8" if setting.quick else "512", "--batch-size", "8" if setting.quick else "128"]
    paths = {name: setting.folder / f"{name}.zarr" for name in ("whole", "workers", "killed")}
    for name, workers in (("whole", "2"), ("workers", "1")):
        done = run([*command, "--workers", workers, "--out", str(paths[name])], 150)
        if done.returncode:
            raise RuntimeError(f"cache-teacher: {done.stderr.strip().splitlines()[-1]}")
    killed_after = kill_after_a_commit([*command, "--workers", "2", "--out", str(paths["killed"])], paths["killed"])
    run([*command, "--workers", "2", "--out", str(paths["killed"])], 150)
    ids = {name: open_archive(path).id for name, path in paths.items()}
    yield row("archives", "ids with other workers", ids["workers"][:16], ids["workers"] == ids["whole"], "equal")
    name, equal = f"id after kill -9 with {killed_after} blocks committed", ids["killed"] == ids["whole"]
    yield row("archives", name, ids["killed"][:16], equal and killed_after > 0, "equal")
    done = run([sys.executable, "-m", "redistill_cli", "verify", str(paths["killed"]), "--full"], 100)
    yield row("archives", "verify --full", done.returncode, done.returncode == 0, "0")


def kill_after_a_commit(command: list[str], path: Path) -> int:
    """Start the command, and kill it once it has committed a block of the teacher; how many it has."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def committed() -> int:
        records = (path / "_redistill" / "blocks").glob("teachers.*.json")
        return sum(".side." not in record.name for record in records)

    deadline = time.monotonic() + 150
    while process.poll() is None and not committed() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    return committed()


TRAINING: dict[str, dict[str, object]] = {
    "plain": {},
    "mixed views": {"views_per_image": 2},
    "EMA": {"ema": 0.99},
    "compiled": {"compile": True},
}


def training(setting: Setting) -> Iterator[harness.Row]:
    """The steps of redistill.training.loop. Batches are put on the device before: loading is not part of a step."""
    bench = Bench(setting.folder, setting.quick)
    data = f"{DRAWN}&n={64 if setting.quick else 512}"
    archive = bench.archive("training", data, 2)
    for name, changed in TRAINING.items():
        if setting.quick and name == "compiled":
            continue  # compiling takes longer than all other checks
        options = TrainOptions(data=data, archive=archive, students=("demo:small",), out=setting.folder / f"t-{name}",
                               workers=0, batch_size=32, device=str(setting.device), **changed)  # type: ignore[arg-type]  # fmt: skip
        with joined_world(str(setting.device)) as world:
            setup = prepare(options, world, NoProgress())
            item = next(iter(setup.feed.start(0, 0)))
            assert setup.targets is not None
            setup.targets.begin_epoch(item.plan.views, None)
            pixels, labels = (x.to(world.device) for x in (item.images.pixels, item.images.labels))

            def step() -> None:
                teacher = setup.targets(item.plan, pixels)  # noqa: B023
                for member in setup.members:  # noqa: B023
                    member.step(pixels, teacher, labels, None, steps.START, 1.0)  # noqa: B023

            for _ in range(3):
                step()
            setting.wait()
            count = 3 if setting.quick else 200
            if setting.cuda:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(count):
                    step()
            finally:
                if setting.cuda:
                    torch.cuda.set_sync_debug_mode("default")
            setting.wait()
        yield row("training", f"{count} steps without a host sync, {name}", "none", passed=True, goal="none")


def step_speed(setting: Setting) -> Iterator[harness.Row]:
    bench = Bench(setting.folder, setting.quick)
    data = f"{DRAWN}&n={128 if setting.quick else 512}"
    archive = bench.archive("steps", data, 1)
    result = steps.measure(data, archive, "demo:small", 4 if setting.quick else 200)
    ratio = float(str(result["steps"]))
    yield row("steps", "labels alone over the archive", ratio, setting.quick or ratio >= STEPS_GOAL, ">= 0.98")
    yield row("steps", "control", float(str(result["control"])), passed=True)


def precision(setting: Setting) -> Iterator[harness.Row]:
    bench = Bench(setting.folder, setting.quick)
    archive = open_archive(bench.archive("precision", f"{DRAWN}&n=256", 1, codec="linear"))
    rows = np.arange(256)
    teacher = redistill.CachedTeacher(archive, device=setting.device)
    with torch.autocast(setting.device.type, dtype=torch.bfloat16):
        logits = teacher(rows, 0)
    yield row("precision", "type under autocast", str(logits.dtype), logits.dtype == torch.float32, "float32")
    difference = max(float(kl_rows(archive.logits(0, rows), logits.cpu().numpy(), t).max()) for t in (1.0, 4.0))
    yield row("precision", "largest KL from numpy's decoding", difference, difference <= 1e-6, "<= 1e-06")


class InterruptAfter(NoProgress):
    """Asks for a stop after a number of training steps, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def advance(self, *_: object, **__: object) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def resume(setting: Setting) -> Iterator[harness.Row]:
    bench = Bench(setting.folder, setting.quick)
    data = f"{DRAWN}&n=128"
    archive = bench.archive("resume", data, 1)
    options = partial(TrainOptions, data=data, archive=archive, students=("demo:small",), workers=0, batch_size=32,
                      out=setting.folder / "resumed", optim=OptimConfig(epochs=3))  # fmt: skip
    try:
        train(options(device="cpu"), InterruptAfter(6))
        yield row("resume", "a CPU run was interrupted", "finished", passed=False)
    except Interrupted:
        yield row("resume", "a CPU run was interrupted", "interrupted", passed=True)
    results = train(options(device=str(setting.device)))
    yield row("resume", f"it ended on {setting.device.type}", f"{len(results)} students", len(results) == 1)


CHECKS: dict[str, Callable[[Setting], Iterator[harness.Row]]] = {
    "encoder": encoder,
    "stage 1": stage1,
    "precision": precision,
    "resume": resume,
    "training": training,
    "archives": archives,
    "steps": step_speed,
    "losses": loss_speed,
    "tests": tests,
}

# -- running them -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "cache"), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=seconds, env=environment(), cwd=ROOT
    )


def outcomes(setting: Setting, name: str, deadline: float) -> list[harness.Row]:
    """The rows of one check; a row that failed if it raises, or if there is no time left for it."""
    if time.monotonic() > deadline:
        return [row(name, "not run", f"no time left of {SECONDS:.0f} s", passed=False)]
    rows: list[harness.Row] = []
    try:
        with tempfile.TemporaryDirectory(dir=setting.folder) as inside, warnings.catch_warnings():
            rows.extend(CHECKS[name](Setting(setting.device, Path(inside), setting.quick, setting.logits)))
    except Exception as error:  # noqa: BLE001  the other checks still run
        text = (str(error).splitlines() or [""])[0][:160]
        rows.append(row(name, "raised", f"{type(error).__name__}: {text}", passed=False))
    return rows


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("logits", type=Path, nargs="?", default=None, help="sets of real logits (.npz)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        sys.exit(3)
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    if args.json is None:
        slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        args.json = ROOT / "bench" / "results" / f"gpu-{slug}.json"
    deadline, rows = time.monotonic() + SECONDS, []
    with tempfile.TemporaryDirectory() as folder:
        for check in CHECKS:
            start = time.monotonic()
            found = outcomes(Setting(device, Path(folder), args.quick, args.logits), check, deadline)
            print(f"{check}: {time.monotonic() - start:.0f} s", flush=True)
            rows += found
            harness.save("gpu", rows, args)  # what is known so far, should the machine be taken away
    harness.report("gpu", rows, args)
    failed = sum(not item["passed"] for item in rows)
    print(f"\n{name}: {len(rows) - failed} of {len(rows)} passed, {args.json}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
