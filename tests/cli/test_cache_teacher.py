"""`redistill cache-teacher` as a user meets it: what it prints and leaves behind, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from redistill_cache import open_archive
from redistill_cache.verify import verify
from redistill_cli.__main__ import main

from tests import odd_teachers
from tests.stage1 import files_of, note_of

DATA, TEACHER = "synthetic?n=90&classes=5", "demo:small?num_classes=5&weights=random"
PLAIN = ("--workers", "0", "--batch-size", "16", "--block-rows", "32")


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    """cached("--views", "2") -> exit code, stdout and stderr of the program itself, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, data: str = DATA, teacher: str = TEACHER, out: str = "a.zarr") -> tuple[int, str, str]:
        line = ["redistill", "cache-teacher", data, "--teacher", teacher, "--out", out, *PLAIN, *words]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def the_line(err: str) -> str:
    """The only line that speaks of an error."""
    lines = [line for line in err.splitlines() if line.startswith("redistill: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def odd(name: str) -> str:
    return f"python:{odd_teachers.__name__}:{name}?num_classes=5&norm=half&size=32"


def test_json_has_the_outcome_and_nothing_else(cached):
    code, out, err = cached("--views", "2", "--json")
    assert code == 0, err
    done = json.loads(out)
    archive = open_archive("a.zarr")
    assert done["id"] == archive.id
    assert (done["samples"], done["views"], done["images"], done["teacher"]) == (90, 2, 180, "small")
    assert done.keys() == {
        *("path", "id", "samples", "views", "images", "seconds", "images_per_second", "total_bytes"),
        *("bytes_per_view", "teacher", "teacher_top1", "floor", "missing"),
    }
    assert done["total_bytes"] == sum((Path("a.zarr") / name).stat().st_size for name in files_of(Path("a.zarr")))
    code, out, _ = cached("--views", "2", "--json")
    assert (code, json.loads(out)["images"], json.loads(out)["id"]) == (0, 0, done["id"])


def test_a_dry_run_says_what_it_would_cost_and_leaves_nothing(cached, tmp_path: Path):
    code, out, err = cached("--views", "8", "--dry-run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["samples"], found["views"], found["blocks"]) == (90, 8, 24)
    assert {"total_bytes", "seconds", "device_hours", "free_bytes", "break_even", "codecs"} < found.keys()
    code, out, err = cached("--dry-run")
    assert code == 0, err
    for word in ("samples", "size", "free", "pace", "time", "break-even", "codec of logits"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_masked_in_the_recorded_command(cached):
    code, _, err = cached("--citation", "https://me:hunter2@example.org/a?token=s3cr3t&x=1")
    assert code == 0, err
    command = note_of(Path("a.zarr"))["command"]
    assert command.startswith(f"cache-teacher {DATA} --teacher {TEACHER} --out a.zarr --workers 0")
    assert command.endswith("--citation https://***@example.org/a?token=***&x=1")


WRONG = {
    "classes": (3, {"data": "synthetic?n=30&classes=6"}, (), "6 classes"),
    "size": (3, {"teacher": odd("fixed_size")}, ("--size", "40"), "use --size 32"),
    "NaN": (3, {"teacher": odd("says_nan")}, (), "NaN or infinity for 16 of 16"),
    "train mode": (3, {"teacher": odd("always_training")}, (), "stays in train mode"),
    "state": (3, {"teacher": odd("counts_calls")}, (), "changes the teacher's state: calls"),
    "weights": (3, {"teacher": "demo:small?num_classes=5"}, (), "add weights=PATH"),
    "no data": (3, {"data": "folder:nowhere"}, (), "'nowhere' is not a folder"),
    "place": (3, {"out": "/dev/null/a.zarr"}, (), "/dev/null is a file"),
    "nothing to extend": (3, {}, ("--extend-views",), "leave out --extend-views"),
    "network": (2, {"teacher": "torchvision:resnet5"}, (), "did you mean resnet50"),
    "layer": (2, {}, ("--signals", "layer9"), "did you mean layer3"),
    "codec": (2, {}, ("--codec", "topk"), "use --codec auto"),
    "device": (2, {}, ("--device", "gpu"), "expected auto, cpu, cuda"),
    "views": (2, {}, ("--views", "0"), "views of at least 1"),
    "block rows": (2, {}, ("--block-rows", "0"), "block_rows of at least 1"),
    "name": (2, {}, ("--teacher-name", "Große"), "--teacher-name must be"),
    "bad images": (2, {}, ("--on-bad-image", "skip"), "fail or exclude"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(cached, tmp_path: Path, what: str):
    expected, named, words, said = WRONG[what]
    code, out, err = cached(*words, **named)
    assert said in the_line(err)
    assert (code, out) == (expected, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(cached):
    code, _, err = cached("--device", "cuda")
    assert code == 3
    assert "use --device cpu" in the_line(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(cached, tmp_path: Path):
    tmp_path.chmod(0o500)
    code, _, err = cached()
    assert code == 3
    assert "check the permissions" in the_line(err)


OTHERWISE = {
    "--batch-size": (("--batch-size", "32"), "batch_size = 16, now it is 32"),
    "--fidelity": (("--fidelity", "1e-2"), "fidelity = 0.001, now it is 0.01"),
    "--feature-fidelity": (("--feature-fidelity", "0.1"), "feature_fidelity"),
    "--codec": (("--codec", "float16"), "codec"),
    "--signals": (("--signals", "layer2"), "signals"),
    "--keep-shift": (("--keep-shift",), "keep_shift"),
    "--amp": (("--amp",), "precision = 'float32', now it is 'bfloat16'"),
    "--compile": (("--compile",), "compile"),
    "--seed": (("--seed", "1"), "seed = 0, now it is 1"),
    "--recipe": (("--recipe", "center"), "recipe"),
    "--size": (("--size", "24"), "recipe.size"),
    "--block-rows": (("--block-rows", "16"), "block_rows"),
    "--licence": (("--licence", "MIT"), "licence"),
    "--citation": (("--citation", "me"), "citation"),
    "--views": (("--views", "3"), "num_views = 1, now it is 3; use extend_views (--extend-views)"),
    "--teacher": (("--teacher", f"{TEACHER}&seed=1"), "weights_digest"),
}


def test_every_option_that_decides_content_is_refused_by_name(cached):
    assert cached()[0] == 0
    before = files_of(Path("a.zarr"))
    for option, (words, named) in OTHERWISE.items():
        code, _, err = cached(*words)
        assert code == 3, (option, err)
        assert named in the_line(err), option
        assert files_of(Path("a.zarr")) == before, option
    assert verify("a.zarr", full=True).ok


def test_a_disk_that_is_full_is_one_line_and_the_rest_is_done_later(cached, tmp_path: Path):
    """No file may grow beyond a few KiB: as if there were no more room, for real."""
    assert cached("--views", "3", out="whole.zarr")[0] == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (100, 1500, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            code, _, err = cached("--views", "3")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 3
        assert f"{tmp_path / 'a.zarr'}: File too large; check the disk" in the_line(err)
    assert cached("--views", "3")[0] == 0
    assert files_of(Path("a.zarr")) == files_of(Path("whole.zarr"))
    assert verify("a.zarr", full=True).ok
