"""Archives at addresses as a user types them: metadata alone, pins, --offline, and secrets that are shown nowhere."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from redistill_cache import download, open_archive
from redistill_cli.__main__ import main

from tests import tiny_archive
from tests.small_archive import DATA, cache

NAME = "tiny.redistill.zarr"
TRAIN = ("--student", "demo:tiny", "--lr", "0.05", "--workers", "0", "--batch-size", "32", "--device", "cpu")

Run = Callable[..., tuple[int, str, str]]
Serve = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("REDISTILL_OFFLINE", "0")  # restores it after a command that sets it
    for patience in ("FIRST_PATIENCE_S", "PATIENCE_S"):
        monkeypatch.setattr(download, patience, 0.0)

    def call(*arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        monkeypatch.setattr("sys.argv", ["redistill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        monkeypatch.setenv("REDISTILL_OFFLINE", "0")
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    tiny_archive.make(tmp_path / "shared" / NAME)
    return tmp_path / "shared"


def test_inspect_shows_the_address_and_fetches_the_metadata(run: Run, serve: Serve, shared: Path, tmp_path: Path):
    address, requests = serve(shared)
    code, out, err = run("inspect", f"{address}/{NAME}")
    assert (code, err) == (0, "")
    assert f"{address}/{NAME}" in out.replace("\n", "")
    assert not [request for request in requests if not request.endswith(".json")]
    assert not list((tmp_path / "cache").rglob("c.*"))
    code, out, _ = run("inspect", f"{address}/{NAME}", "--json")
    assert json.loads(out)["path"] == f"{address}/{NAME}"
    code, _, err = run("inspect", f"{address}/{NAME}", "--offline")
    assert code == 3
    assert "run the command once without --offline" in err


def test_offline_uses_the_copy_of_an_earlier_command(run: Run, serve: Serve, shared: Path):
    address, requests = serve(shared)
    assert run("verify", f"{address}/{NAME}")[0] == 0
    before = len(requests)
    assert run("verify", f"{address}/{NAME}", "--offline")[0] == 0
    assert run("inspect", f"{address}/{NAME}", "--offline")[0] == 0
    assert len(requests) == before


def test_a_pin_is_checked_by_every_command(run: Run, shared: Path):
    identity = open_archive(shared / NAME).id
    for command in ("inspect", "verify"):
        assert run(command, f"{shared / NAME}#sha256={identity}")[0] == 0
        code, _, err = run(command, f"{shared / NAME}#sha256={'0' * 64}")
        assert code == 3
        assert f"expected the archive with id {'0' * 64}, found {identity}" in err
        assert len(err.splitlines()) == 1


def test_passwords_are_shown_nowhere(run: Run, serve: Serve, shared: Path):
    address, _ = serve(shared)
    secret = address.replace("://", "://me:hunter2@")
    for location in (f"{secret}/none.zarr", f"{secret}/none.zarr?token=s3cr3t", f"{secret}/../x", f"{secret}:x/y"):
        code, out, err = run("verify", location)
        assert code in (2, 3)
        assert "hunter2" not in out + err
        assert "s3cr3t" not in out + err
    code, out, err = run("inspect", f"{secret}/{NAME}", "--json")
    assert code == 0, err
    assert "hunter2" not in out + err
    code, out, err = run("cache-teacher", f"wds:{secret}/a.tar", "--teacher", "demo:small?weights=random", "--out", "x")
    assert code != 0
    assert "hunter2" not in out + err


def test_train_records_a_pin_and_repeats_it(run: Run, serve: Serve, tmp_path: Path):
    path = cache(tmp_path / "shared" / "a.redistill.zarr")
    address, requests = serve(path.parent)
    identity = open_archive(path).id
    out = tmp_path / "run"
    train = ("train", DATA, *TRAIN, "--epochs", "1", "--out", out)
    code, _, err = run(*train, "--archive", f"{address}/{path.name}#sha256={identity}")
    assert code == 0, err
    recorded = tomllib.loads((out / "config.toml").read_text())["options"]["archive"]
    assert recorded.endswith(f"#sha256={identity}")
    assert json.loads((out / "result.json").read_text())["archive_id"] == identity
    shutil.rmtree(path)
    tiny_archive.make(path)  # another archive at the same address
    before = len(requests)
    code, _, err = run(*train, "--archive", f"{address}/{path.name}")
    assert code == 0, err
    assert "already finished" in err
    assert len(requests) == before
    code, _, err = run(*train, "--archive", path)
    assert code == 3
    assert f"expected the archive with id {identity}" in err
