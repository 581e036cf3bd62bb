"""`redistill cache-teacher`: output, files, exit codes, and one-line errors."""

from __future__ import annotations

import json
import os
import resource
import shlex
import sys
from pathlib import Path

import pytest
import torch
from redistill_cache import open_archive
from redistill_cache.verify import verify
from redistill_cli.__main__ import main

from tests.command_line import without
from tests.stage1 import file_hashes, odd_teacher, read_note

DATA, TEACHER = "synthetic?n=90&classes=5", "demo:small?num_classes=5&weights=random"
PLAIN = ("--workers", "0", "--batch-size", "16", "--block-rows", "32")


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    """cached("--views", "2") -> exit code, stdout and stderr of the program itself, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*options: str, data: str = DATA, teacher: str = TEACHER, out: str = "a.zarr") -> tuple[int, str, str]:
        defaults = ("--teacher", teacher, "--out", out, *PLAIN)
        command = ["redistill", "cache-teacher", data, *without(defaults, *options), *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_:
            main()
        output = capsys.readouterr()
        return int(exit_.value.code or 0), output.out, output.err

    return call


def error_line(err: str) -> str:
    """The only error line."""
    lines = [line for line in err.splitlines() if line.startswith("redistill: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_json_is_the_only_output(cached):
    code, out, err = cached("--views", "2", "--json")
    assert code == 0, err
    result = json.loads(out)
    archive = open_archive("a.zarr")
    assert result["id"] == archive.id
    assert (result["samples"], result["views"], result["images"], result["teacher"]) == (90, 2, 180, "small")
    assert result.keys() == {
        *("path", "id", "samples", "views", "images", "seconds", "images_per_second", "total_bytes"),
        *("bytes_per_view", "teacher", "signals", "teacher_top1", "floor", "missing"),
    }
    assert result["total_bytes"] == sum((Path("a.zarr") / name).stat().st_size for name in file_hashes(Path("a.zarr")))
    code, out, _ = cached("--views", "2", "--json")
    assert (code, json.loads(out)["images"], json.loads(out)["id"]) == (0, 0, result["id"])


def test_a_finished_archive_says_what_it_lacks_to_be_published(cached, monkeypatch: pytest.MonkeyPatch, capsys):
    code, out, err = cached("--licence", "cc0-1.0", out="a b.zarr")
    assert code == 0, err
    [line] = [line for line in out.splitlines() if line.startswith("publishing")]
    assert line.split(maxsplit=1)[1] == "missing citation; redistill archive edit 'a b.zarr' --citation TEXT"
    advised = shlex.split(line.partition("; ")[2].replace("TEXT", "'Nobody (2026)'"))
    monkeypatch.setattr(sys, "argv", advised)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    capsys.readouterr()
    code, out, _ = cached(out="a b.zarr")
    assert (code, "publishing" in out) == (0, False)
    code, _, err = cached("--licence", "MIT", out="a b.zarr")
    assert code == 3
    assert "has the licence 'CC0-1.0', now it is 'MIT'" in error_line(err)


def test_a_dry_run_estimates_and_writes_nothing(cached, tmp_path: Path):
    code, out, err = cached("--views", "8", "--dry-run", "--json")
    assert code == 0, err
    estimate = json.loads(out)
    assert (estimate["samples"], estimate["views"], estimate["blocks"]) == (90, 8, 24)
    assert {"total_bytes", "seconds", "device_hours", "free_bytes", "break_even", "codecs"} < estimate.keys()
    code, out, err = cached("--dry-run")
    assert code == 0, err
    for name in ("samples", "size", "free", "speed", "time", "break-even", "codec of logits"):
        assert name in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_ranks_the_layers(cached, tmp_path: Path):
    code, out, err = cached("--dry-run", "--rank-layers", "--json", "--page", "layers.html")
    assert code == 0, err
    result = json.loads(out)
    assert result["samples"] == 90  # the estimate is there as well
    ranking = result["layers"]
    assert (ranking["images"], ranking["classes"]) == (90, 5)
    assert "advice" in ranking["advice"]
    layers = {layer["layer"]: layer for layer in ranking["layers"]}
    assert list(layers) == ["layer1.2", "layer2.2", "layer3.2", "penultimate"]
    assert sorted(layer["rank"] for layer in layers.values()) == [1, 2, 3, 4]
    one = layers["layer2.2"]
    assert one["q"] == pytest.approx(one["separation"] + (one["information"] * one["efficiency"]) ** 0.5)
    assert one["shape"] == [32, 8, 8]
    assert set(one["pooled"]) == {"q", "separation", "information", "efficiency"}
    page = (tmp_path / "layers.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    for name in layers:
        assert name in page
    assert f"{one['q']:.3f}" in page
    assert [path.name for path in tmp_path.iterdir()] == ["layers.html"]
    code, out, err = cached("--dry-run", "--rank-layers")
    assert code == 0, err
    assert f"{one['q']:.3f}" in out
    assert "It is advice" in out


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_the_settings_in_effect_are_printed_before_the_teacher_runs(cached, dry: tuple[str, ...]):
    code, _, err = cached("--views", "2", "--seed", "3", "--signals", "logits,layer3", *dry)
    assert code == 0, err
    lines = [" ".join(line.split()) for line in err.splitlines()]
    for line in (
        f"data {DATA}, 90 images",
        f"teacher {TEACHER}, named small",
        "signals logits, layer3",
        "views 2 per image, seed 3",
        "codec auto, KL at most 0.001 in every row, error of features at most 0.1 of the distance from the mean row",
        "batch 16, blocks of 32 rows, 0 rendering processes",
    ):
        assert line in lines, line
    assert any(line.startswith("recipe ") and line.endswith("size=32") for line in lines)
    for name in ("device", "normalisation mean"):
        assert any(line.startswith(f"{name} ") for line in lines), name


def test_secrets_are_masked_in_the_recorded_command(cached):
    code, _, err = cached("--citation", "https://me:hunter2@example.org/a?token=s3cr3t&x=1")
    assert code == 0, err
    command = read_note(Path("a.zarr"))["command"]
    assert command.startswith(f"cache-teacher {DATA} --teacher {TEACHER} --out a.zarr --workers 0")
    assert command.endswith("--citation https://***@example.org/a?token=***&x=1")


RANKING = ("--dry-run", "--rank-layers")
WRONG = {
    "classes": (3, {"data": "synthetic?n=30&classes=6"}, (), "6 classes"),
    "size": (3, {"teacher": odd_teacher("FixedSize")}, ("--size", "40"), "use --size 32"),
    "NaN": (3, {"teacher": odd_teacher("NanLogits")}, (), "NaN or infinity for 16 of 16"),
    "train mode": (3, {"teacher": odd_teacher("AlwaysTraining")}, (), "stays in train mode"),
    "state": (3, {"teacher": odd_teacher("CountsCalls")}, (), "changes the teacher's state: calls"),
    "weights": (3, {"teacher": "demo:small?num_classes=5"}, (), "add weights=PATH"),
    "no data": (3, {"data": "folder:nowhere"}, (), "'nowhere' is not a folder"),
    "place": (3, {"out": "/dev/null/a.zarr"}, (), "/dev/null is a file"),
    "nothing to extend": (3, {}, ("--extend-views", "--views", "2"), "leave out --extend-views"),
    "network": (2, {"teacher": "torchvision:resnet5"}, (), "did you mean resnet50"),
    "layer": (2, {}, ("--signals", "layer9"), "did you mean layer3"),
    "codec": (2, {}, ("--codec", "topk"), "use --codec auto"),
    "device": (2, {}, ("--device", "gpu"), "expected auto, cpu, cuda"),
    "views": (2, {}, ("--views", "0"), "--views must be at least 1, found 0"),
    "block rows": (2, {}, ("--block-rows", "0"), "--block-rows must be at least 1, found 0"),
    "fidelity": (2, {}, ("--fidelity", "2"), "--fidelity must be at least 1e-09 and at most 1, found 2.0"),
    "name": (2, {}, ("--teacher-name", "Große"), "--teacher-name must be"),
    "ranking without a dry run": (2, {}, ("--rank-layers",), "has no effect without --dry-run"),
    "page without a ranking": (2, {}, ("--dry-run", "--page", "a.html"), "has no effect without --rank-layers"),
    "page is a folder": (2, {}, (*RANKING, "--page", "/"), "is a folder"),
    "one image a class": (
        3,
        {"data": "synthetic?n=5&classes=5"},
        ("--dry-run", "--rank-layers"),
        "at least two classes",
    ),
    "no layers": (3, {"teacher": odd_teacher("Branching")}, ("--dry-run", "--rank-layers"), "cannot be traced"),
    "bad images": (2, {}, ("--on-bad-image", "skip"), "--on-bad-image 'skip' is not known"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_and_nothing_is_written(cached, tmp_path: Path, what: str):
    expected, arguments, options, message = WRONG[what]
    code, out, err = cached(*options, **arguments)
    assert message in error_line(err)
    assert (code, out) == (expected, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_missing_gpu(cached):
    code, _, err = cached("--device", "cuda")
    assert code == 3
    assert "use --device cpu" in error_line(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written(cached, tmp_path: Path):
    tmp_path.chmod(0o500)
    code, _, err = cached()
    assert code == 3
    assert "check the permissions" in error_line(err)


CHANGED = {
    "--batch-size": (("--batch-size", "32"), "batch_size = 16, now it is 32"),
    "--fidelity": (("--fidelity", "1e-2"), "fidelity = 0.001, now it is 0.01"),
    "--codec": (("--codec", "float16"), "codec"),
    "--keep-shift": (("--keep-shift",), "keep_shift"),
    "--amp": (("--amp",), "precision = 'float32', now it is 'bfloat16, final layer float32'"),
    "--compile": (("--compile",), "compile"),
    "--seed": (("--seed", "1"), "seed = 0, now it is 1"),
    "--recipe": (("--recipe", "center"), "recipe"),
    "--size": (("--size", "24"), "--recipe and --size"),
    "--block-rows": (("--block-rows", "16"), "block_rows"),
    "--licence": (("--licence", "MIT"), "licence"),
    "--citation": (("--citation", "me"), "citation"),
    "--data-licence": (("--data-licence", "MIT"), "leave out --data-licence"),
    "--views": (("--views", "3"), "num_views = 1, now it is 3; use extend_views (--extend-views)"),
    "--teacher": (("--teacher", f"{TEACHER}&seed=1"), "weights_digest"),
}


def test_every_option_that_affects_content_is_refused_by_name(cached):
    assert cached()[0] == 0
    before = file_hashes(Path("a.zarr"))
    for option, (changed, message) in CHANGED.items():
        code, _, err = cached(*changed)
        assert code == 3, (option, err)
        assert message in error_line(err), option
        assert file_hashes(Path("a.zarr")) == before, option
    assert verify("a.zarr", full=True).ok


def test_fewer_views_than_the_archive_has_are_not_advised_to_extend_it(cached):
    assert cached("--views", "3")[0] == 0
    code, _, err = cached("--views", "2")
    assert code == 3
    assert "num_views = 3, now it is 2; use the same setting" in error_line(err)


def test_a_teacher_without_weights_is_told_so(cached):
    code, _, err = cached(teacher="demo:small")
    assert code == 2
    assert "add weights=PATH for trained weights, or num_classes=N" in error_line(err)


def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(cached, tmp_path: Path):
    """The kernel lets no file grow beyond a few KiB."""
    assert cached("--views", "3", out="whole.zarr")[0] == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (100, 1500, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            code, _, err = cached("--views", "3")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 3
        assert f"{tmp_path / 'a.zarr'}: File too large; check the disk" in error_line(err)
    assert cached("--views", "3")[0] == 0
    assert file_hashes(Path("a.zarr")) == file_hashes(Path("whole.zarr"))
    assert verify("a.zarr", full=True).ok
