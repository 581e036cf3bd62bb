"""`redistill inspect` and `redistill verify` as processes: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import ArchiveSpec, ArchiveWriter, ArraySpec, SignalSpec, TeacherSpec, open_archive
from redistill_cache.codecs import BlockStats, fit_codec

from redistill.caching import cache_teacher
from tests.stage1 import five_class_options

ROWS, VIEWS, CLASSES = 40, 2, 6


def write_archive(path: Path, *, seal: bool = True) -> np.ndarray:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(VIEWS, ROWS, CLASSES)).astype(np.float32)
    codec = fit_codec("linear", logits.reshape(-1, CLASSES))
    spec = ArchiveSpec(
        num_samples=ROWS,
        num_views=VIEWS,
        num_classes=CLASSES,
        block_rows=16,
        view_arrays=(ArraySpec("flip", "uint8"),),
        licence="CC-BY-4.0 \x1b[31m",
    )
    writer = ArchiveWriter.create(path, spec)
    digests = rng.integers(0, 256, (ROWS, 32), dtype=np.uint8)
    writer.write_samples(
        [f"k{i}" for i in range(ROWS)], np.arange(ROWS) % CLASSES, digests, np.full((ROWS, 2), 8, np.uint32)
    )
    writer.add_teacher(TeacherSpec("demo", (SignalSpec.of("logits", codec),)), {"logits": codec.side()})
    for block in writer.missing("views"):
        writer.write(block, {"flip": np.zeros(len(block.rows), np.uint8)})
    for block in writer.missing("teachers/demo"):
        encoded = codec.encode(logits[block.view, block.start : block.stop])
        arrays = {f"logits/{name}": np.asarray(values) for name, values in encoded.arrays.items()}
        writer.write(block, arrays, {"logits": BlockStats.of(encoded).to_json()})
    if seal:
        writer.seal()
    return logits


@pytest.fixture
def run(tmp_path: Path):
    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_COLOR": "1", "COLUMNS": "120"}
        command = [sys.executable, "-m", "redistill_cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return call


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "t.redistill.zarr"
    write_archive(path)
    return path


def test_inspect_as_json(run, archive: Path):
    process = run("inspect", archive, "--json")
    assert process.returncode == 0, process.stderr
    description = json.loads(process.stdout)
    assert description["id"] == open_archive(archive).id
    assert (
        description["complete"],
        description["num_samples"],
        description["num_views"],
        description["num_classes"],
    ) == (True, 40, 2, 6)
    signal = description["teachers"]["demo"]["logits"]
    assert signal["codec"] == "linear"
    assert signal["bytes_per_view"] == pytest.approx(sum(signal["bytes_per_view_by_array"].values()))
    assert (
        0 < signal["fidelity"]["mean_kl_t1"] <= signal["fidelity"]["max_kl_t1"] <= signal["fidelity"]["bound"] == 1e-3
    )
    assert description["total_bytes"] == sum(path.stat().st_size for path in archive.rglob("*") if path.is_file())


def test_inspect_as_text_without_escape_codes(run, archive: Path):
    process = run("inspect", archive)
    assert process.returncode == 0, process.stderr
    assert "demo" in process.stdout
    assert "CC-BY-4.0" in process.stdout
    assert "\x1b" not in process.stdout


def test_inspect_shows_every_signal_with_its_bound(run, tmp_path: Path):
    path = tmp_path / "f.redistill.zarr"
    options = five_class_options(path, signals=("logits", "layer2"), feature_fidelity=0.2)
    cache_teacher(options)
    cache_teacher(replace(options, signals=("penultimate",), feature_fidelity=0.05))
    lines = [" ".join(line.split()) for line in run("inspect", path).stdout.splitlines()]
    [logits, layer2, penultimate] = [line.split() for line in lines if line.startswith("small")]
    assert logits[:5] == ["small", "logits", "linear", "5", "2"] or logits[2] == "compander"
    assert logits[6:8] == ["KL", "0.001"]
    assert layer2[1:5] == ["layer2", "linear", "32", "2"]
    assert layer2[6:8] == ["centred", "0.2"]
    assert float(layer2[8]) < float(layer2[9]) <= 0.2
    assert (penultimate[1], penultimate[6:8]) == ("penultimate", ["centred", "0.05"])
    assert any(line.startswith("centred: |error| relative to the distance") for line in lines)
    described = json.loads(run("inspect", path, "--json").stdout)["teachers"]
    assert list(described) == ["small"]
    assert list(described["small"]) == ["logits", "layer2", "penultimate"]
    stored = described["small"]["penultimate"]
    assert (stored["codec"], stored["views"]) == ("linear", 2)
    assert (stored["fidelity"]["bound"], stored["fidelity"]["metric"]) == (0.05, "centred")
    assert 0 < stored["fidelity"]["mean_centred"] <= stored["fidelity"]["max_centred"] <= 0.05
    assert stored["bytes_per_view"] == pytest.approx(sum(stored["bytes_per_view_by_array"].values()))


def test_an_unfinished_archive_is_described(run, tmp_path: Path):
    write_archive(tmp_path / "u.redistill.zarr", seal=False)
    description = json.loads(run("inspect", tmp_path / "u.redistill.zarr", "--json").stdout)
    assert (description["complete"], description["id"]) == (False, None)
    assert description["committed_blocks"] == 2 * 2 * 3 + 2


def test_verify_finds_a_flipped_bit_and_quarantine_marks_the_block_missing(run, archive: Path):
    assert run("verify", archive).returncode == 0
    shard = archive / "teachers/demo/logits/q/c.1.2.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    process = run("verify", archive, "--json")
    report = json.loads(process.stdout)
    assert process.returncode == 4
    assert not report["ok"]
    assert report["alignment"] is None
    assert [(item["path"], item["block"]) for item in report["damaged"]] == [
        ("teachers/demo/logits/q/c.1.2.0", "teachers/demo view 1 block 2")
    ]
    assert run("verify", archive, "--quarantine").returncode == 4
    missing = ArchiveWriter.resume(archive).missing("teachers/demo")
    assert [(block.view, block.index) for block in missing] == [(1, 2)]
    process = run("verify", archive)
    assert process.returncode == 1
    assert "unfinished, 1 blocks are missing" in process.stdout  # the other files are intact


def test_an_archive_without_its_manifest_is_unfinished(run, archive: Path):
    (archive / "_redistill/manifest.json").unlink()
    process = run("verify", archive)
    assert process.returncode == 1
    assert "unfinished, 0 blocks are missing and it is not sealed" in process.stdout
    report = json.loads(run("verify", archive, "--json").stdout)
    assert (report["ok"], report["missing_blocks"], report["damaged"]) == (False, 0, [])


def test_a_changed_file_is_found_although_size_and_modification_time_are_restored(run, archive: Path):
    assert run("verify", archive).returncode == 0
    shard = archive / "views/flip/c.0.0"
    before = shard.stat()
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run("verify", archive).returncode == 4
    assert run("verify", archive, "--full").returncode == 4


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_errors_are_one_line(run, tmp_path: Path, command: str):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("nothing", "it does not exist"), ("file", "it is a file"), ("empty", "no zarr.json")):
        process = run(command, tmp_path / name)
        assert (process.returncode, process.stdout) == (3, "")
        assert message in process.stderr
        assert process.stderr.count("\n") == 1
    assert run(command).returncode == 2


def test_archives_at_a_url(tmp_path: Path, run, serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_archive(tmp_path / "a.redistill.zarr")
    address, _ = serve(tmp_path)
    remote = json.loads(run("inspect", f"{address}/a.redistill.zarr", "--json").stdout)
    local = json.loads(run("inspect", tmp_path / "a.redistill.zarr", "--json").stdout)
    assert remote.pop("path") != local.pop("path")
    assert remote == local
    assert run("verify", f"{address}/a.redistill.zarr", "--full").returncode == 0
    missing = run("inspect", f"{address}/b.redistill.zarr")
    assert (missing.returncode, missing.stderr.count("\n")) == (3, 1)


def test_ctrl_c_is_reported_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.redistill.zarr"
        command = [sys.executable, "-m", "redistill_cli", "inspect", address]
        # Tests that run in the background would ignore SIGINT.
        default_sigint = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **default_sigint)
        try:
            connection, _ = silent.accept()  # from here on it waits for a response
            with connection:
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "redistill: interrupted\n")


def test_an_archive_without_canaries_is_said_to_have_none(run, archive: Path):
    process = run("verify", archive)
    assert process.stdout.rstrip().endswith("it has no canaries, so no images can be compared with it")
    assert json.loads(run("verify", archive, "--json").stdout)["canaries_per_view"] == 0
    assert "no canaries" in run("inspect", archive).stdout
    compared = run("verify", archive, "--data", "synthetic?n=40&classes=6", "--json")
    assert compared.returncode == 3
