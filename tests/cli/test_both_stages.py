"""The commands as a user types them: both stages, the report, and one-line errors with their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redistill_cache import open_archive
from redistill_cli.__main__ import main

from tests.command_line import without
from tests.small_archive import DATA, TEACHER, VAL, cache

ROOT = Path(__file__).resolve().parents[2]


def environment(tmp_path: Path) -> dict[str, str]:
    search = os.pathsep.join(str(ROOT / part) for part in ("", "cache", "cli"))
    return os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "teacher.redistill.zarr")


@pytest.fixture
def run(tmp_path: Path):
    """run("train", ...) -> the finished process of the command, in an empty folder."""

    def call(*arguments: object, module: tuple[str, ...] = ("redistill_cli",)) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *module, *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path), text=True, capture_output=True, timeout=200, check=False
        )

    return call


TRAIN = ("--student", "demo:tiny", "--epochs", "2", "--lr", "0.05", "--workers", "0", "--batch-size", "32")


def test_a_dry_run_of_training_says_what_it_needs_and_writes_nothing(run, archive: Path, tmp_path: Path):
    arguments = ("train", DATA, "--archive", archive, "--out", "runs/new", "--val", "0.1", *TRAIN, "--dry-run")
    process = run(*arguments)
    assert process.returncode == 0, process.stderr
    assert "10: 2 epochs of 5 with 134 images" in process.stdout
    assert "for checkpoints and weights" in process.stdout
    assert "validation: 16 of 150 images are held out" in process.stderr
    process = run(*arguments, "--json")
    needs = json.loads(process.stdout)
    assert (needs["steps"], needs["images"], needs["validation_images"]) == (10, 134, 16)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_continued_or_one_line_says_why_not(run, archive: Path):
    constant = ("train", DATA, "--archive", archive, "--out", "run", "--sched", "constant", "--json")
    longer = (*without(TRAIN, "--epochs"), "--epochs", "3")
    assert run(*constant, *TRAIN).returncode == 0
    process = run(*constant, *longer)
    assert json.loads(process.stdout)["epochs"] == 3
    assert "resuming at epoch 3, batch 1" in process.stderr
    cosine = ("train", DATA, "--archive", archive, "--out", "cosine")
    assert run(*cosine, *TRAIN).returncode == 0
    process = run(*cosine, *longer)
    assert process.returncode == 3
    assert "cannot be continued to 3: the learning rate of --sched cosine depends on" in process.stderr


def test_from_a_teacher_to_a_page(run, tmp_path: Path):
    process = run(
        "cache-teacher", DATA, "--teacher", TEACHER, "--views", "2", "--out", "a.zarr", "--workers", "0", "--json"
    )
    assert process.returncode == 0, process.stderr
    cached = json.loads(process.stdout)
    assert cached["images"] == 300
    process = run(
        *("train", DATA, "--archive", "a.zarr", "--out", "runs", "--val", VAL, *TRAIN, "--json"),
        *("--loss", "power", "--loss", "ce", "--seed", "0", "--seed", "1"),
    )
    assert process.returncode == 0, process.stderr
    assert "views are exact" in process.stderr
    runs = json.loads(process.stdout)["runs"]
    assert [result["run"] for result in runs] == ["power-0", "power-1", "ce-0", "ce-1"]
    assert {"top1", "top5", "nll", "ece", "agreement", "images_per_second"} <= set(runs[0])
    assert "report: runs/report.html" in process.stderr
    assert cached["id"] in (tmp_path / "runs/report.html").read_text()
    process = run("evaluate", "runs/power-1", "--data", VAL, "--json", "--workers", "0")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["top1"] == runs[1]["top1"]
    process = run("report", "runs", "--archive", "a.zarr", "--data", DATA, "--out", "page.html")
    assert process.returncode == 0, process.stderr
    page = (tmp_path / "page.html").read_text()
    assert cached["id"] in page
    assert page.count("<svg") >= 4
    assert page.count("data:image/png") == 12


@pytest.mark.parametrize("option", ["students", "online_teacher"])
def test_a_config_names_no_code(run, tmp_path: Path, archive: Path, option: str):
    """Not even one that says that it may: code comes from the command line only."""
    spec = "python:marks:build?norm=half&size=32"
    (tmp_path / "marks.py").write_text("open('ran', 'w').close()\n")
    value = f'["{spec}"]' if option == "students" else f'"{spec}"'
    (tmp_path / "c.toml").write_text(f"[options]\n{option} = {value}\nallow_python = true\n")
    own = ("--student", "demo:tiny") if option == "online_teacher" else ()
    process = run("train", DATA, "--archive", archive, "--out", "one", "--config", "c.toml", "--workers", "0", *own)
    assert process.returncode in (2, 3), process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    assert not (tmp_path / "ran").exists()


def test_a_run_is_repeated_from_its_config(run, tmp_path: Path, archive: Path):
    first = run("train", DATA, "--archive", archive, "--out", "one", *TRAIN)
    assert first.returncode == 0, first.stderr
    (tmp_path / "two" / "report.html").mkdir(parents=True)  # a page that cannot be written must not fail the run
    again = run("train", "--config", "one/config.toml", "--trust-config", "--out", "two")
    assert again.returncode == 0, again.stderr
    assert "training is finished, but two/report.html was not written" in again.stderr
    assert (tmp_path / "one/student.safetensors").read_bytes() == (tmp_path / "two/student.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_train_on_the_same_batches(run, tmp_path: Path, archive: Path):
    """Under torchrun with gloo; batch norms see half of a batch each, so weights are near and not equal."""
    alone = run("train", DATA, "--archive", archive, "--out", "alone", "--val", VAL, *TRAIN, "--json")
    assert alone.returncode == 0, alone.stderr
    torchrun = ("torch.distributed.run", "--nproc-per-node=2", "-m", "redistill_cli")
    both = run("train", DATA, "--archive", archive, "--out", "both", "--val", VAL, *TRAIN, "--json", module=torchrun)
    assert both.returncode == 0, both.stderr
    one, two = json.loads(alone.stdout), json.loads(both.stdout)
    assert two["nll"] == pytest.approx(one["nll"], rel=0.1)
    assert two["evaluation"]["rows"] == one["evaluation"]["rows"] == 64
    resumed = run("train", DATA, "--archive", archive, "--out", "both", "--val", VAL, *TRAIN, "--json")
    resumed_by_one = json.loads(resumed.stdout)
    assert resumed_by_one["epochs"] == 2, "one process resumes the run of two"
    assert resumed_by_one["nll"] == pytest.approx(two["nll"], rel=1e-5), "two validated the network that was saved"


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (("synthetic?n=150&classes=8&seed=9",), 3, "expected the images the archive was made from"),
        (("synthetic?n=120&classes=8",), 3, "30 missing"),
        ((DATA, "--student", "demo:tiny?num_classes=9"), 3, "9 classes"),
        ((DATA, "--student", "demo:huge"), 2, "demo:huge"),
        ((DATA, "--loss", "powr"), 2, "did you mean power?"),
        ((DATA, "--epochs", "0"), 2, "--epochs"),
        ((DATA, "--teacher-names", "other"), 3, "teachers: small"),
        ((DATA, "--device", "cuda:7"), 3, "GPU"),
        ((DATA, "--val", "synthetic?n=20&classes=9&split=val"), 3, "class"),
        ((DATA, "--log", "paper"), 2, "--log 'paper' is not known"),
        ((DATA, "--resume", "maybe"), 2, "--resume 'maybe' is not known; known: auto, never"),
        ((DATA, "--decay-milestones", "10,x"), 2, "--decay-milestones takes numbers separated by commas, found '10,x'"),
        ((DATA, "--preset", "cifar_kd"), 2, "did you mean cifar-kd?"),
        ((DATA, "--config", "nothing.toml"), 2, "no configuration"),
        ((DATA, "--out", "/proc/run"), 3, "cannot write /proc/run"),
        ((DATA, "--out", "{archive}/run"), 2, "is inside the archive"),
        ((DATA, "--order-seed", "-1"), 2, "--order-seed must be at least 0"),
        ((DATA, "--seed", "99999999999999999999"), 2, "--seed must be at least 0 and at most"),
        ((DATA, "--workers", "-1"), 2, "--workers must be at least 0 and at most 1024, found -1"),
        ((DATA, "--cache-memory", "nan"), 2, "--cache-memory must be at least 0, found nan"),
        ((DATA, "--checkpoint-minutes", "-1"), 2, "--checkpoint-minutes must be at least 0"),
        ((DATA, "--val-archive", "{archive}"), 2, "add --val"),
        ((DATA, "--teacher-names", "small,small"), 2, "a name twice"),
        ((DATA, "--views-per-image", "4"), 3, "the archive has 3"),
        ((DATA, "--size", "1"), 2, "--size must be at least 2"),
        ((DATA, "--size", "8", "--grad-accum", "32"), 3, "a smaller --grad-accum"),
    ],
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, archive: Path, changed: tuple, code: int, message: str
):
    """In this process, as a new one takes seconds to start."""
    monkeypatch.chdir(tmp_path)
    defaults = ("--archive", str(archive), "--out", "run", *TRAIN)
    options = [argument.format(archive=archive) for argument in changed[1:]]
    monkeypatch.setattr(sys, "argv", ["redistill", "train", changed[0], *without(defaults, *options), *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    err = capsys.readouterr().err
    assert exit_.value.code == code, err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("redistill:")]) == 1
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_train_prints_the_settings_in_effect_before_it_starts(run, archive: Path):
    """Of the preset as well; the seed of the run, and a size that is not the archive's."""
    process = run(
        *("train", DATA, "--archive", archive, "--student", "demo:tiny", "--preset", "cifar-kd", "--epochs", "1"),
        *("--sched", "constant", "--seed", "4", "--size", "24", "--workers", "0", "--out", "run", "--loss", "kl"),
    )
    assert process.returncode == 0, process.stderr
    lines = [" ".join(line.split()) for line in process.stderr.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("archive "))
    assert lines[first] == f"archive teacher.redistill.zarr ({open_archive(archive).id[:12]}), 150 samples, 3 views"
    assert lines[first + 2].endswith("?size=32, students at 24 pixels")
    expected = [
        "teacher small",
        "validation none",
        "student demo:tiny",
        "loss kl",
        "seed 4",
        "optimizer sgd, lr 0.05, momentum 0.9, weight decay 0.0005",
        "schedule 1 epoch, constant",
        "batch 64, 1 view per image, 3 batches per epoch",
    ]
    assert [line for line in lines[first:] if line in expected] == expected
    assert next(number for number, line in enumerate(lines) if line.startswith("epoch 1 ")) > first + len(expected)


def test_a_damaged_archive_is_exit_code_four(run, tmp_path: Path):
    path = cache(tmp_path / "b.redistill.zarr", views=1)
    shard = next(path.glob("teachers/small/logits/q/c.*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    process = run("train", DATA, "--archive", path, "--out", "run", *TRAIN)
    assert process.returncode == 4, process.stderr
    assert str(shard.relative_to(path)) in process.stderr


def test_a_diverging_loss_stops_the_run(run, archive: Path):
    diverging = ("--lr", "1e30", "--loss", "ce")
    process = run("train", DATA, "--archive", archive, "--out", "run", *without(TRAIN, *diverging), *diverging)
    assert process.returncode == 1, process.stderr
    assert "no longer finite at epoch 1, batch" in process.stderr


def test_doctor_without_arguments(run):
    diagnosis = json.loads(run("doctor", "--json").stdout)
    assert diagnosis["cores"] >= 1
    assert diagnosis["limit"]
    assert diagnosis["views_per_second_and_core"] > 0


@pytest.mark.slow
def test_an_index_is_written_once_and_used_by_the_next_command(run, tmp_path: Path):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    made = run("index", "folder:train", "--out", "index.npz", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == {"images": 8, "bad": 0, "reused": 0, "path": "index.npz"}
    teacher = ("--teacher", "demo:tiny?num_classes=2&weights=random", "--out", "a.redistill.zarr", "--workers", "0")
    cached = run("cache-teacher", "folder:train?index=index.npz", *teacher, "--share", "1/2")
    assert cached.returncode == 0, cached.stderr
    assert "8 samples" in cached.stdout
    wrong = run("cache-teacher", "folder:train?index=none.npz", *teacher)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (3, 1)
    assert "none.npz, found nothing; write it: redistill index DATA --out FILE" in wrong.stderr


@pytest.mark.slow
def test_doctor_says_what_limits_both_stages(run, tmp_path: Path):
    options = ("--teacher", "demo:tiny?num_classes=10&weights=random", "--student", "demo:tiny")
    text = run("doctor", *options, "--archive-dir", tmp_path).stdout
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "limited by the" in lines["stage 1"]
    assert "limited by the" in lines["stage 2"]
    assert "worker" in lines["stage 1"]
    assert list(tmp_path.glob(".redistill-doctor-*")) == []
    missing = run("doctor", *options, "--archive-dir", tmp_path / "missing")
    assert missing.returncode == 3
    assert len(missing.stderr.splitlines()) == 1
