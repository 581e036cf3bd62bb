"""Publishing to each kind of place, by the command, its own process and real servers; and use by another lab."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.packing import pack

from tests import tiny_archive
from tests.hub_server import TOKEN, Hub, hub_server
from tests.s3_server import KEYS, objects, s3_server
from tests.tiny_archive import SPEC, contents

Run = Callable[..., subprocess.CompletedProcess[str]]
STATED = replace(SPEC, source={"kind": "synthetic", "description": "noise"})


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """With all that a published archive must state."""
    path = tmp_path / "mine" / "a.redistill.zarr"
    tiny_archive.make(path, STATED)
    return path


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with hub_server(Hub()) as server:
        yield server


def environment(tmp_path: Path, extra: Mapping[str, str]) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    folders = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
    return kept | folders | {"NO_COLOR": "1", "COLUMNS": "120", **extra}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "redistill_cli", "archive", *map(str, arguments)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`redistill archive`; whatever it prints, no secret is in it."""

    def call(*arguments: str | Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            env=environment(tmp_path, env),
            cwd=tmp_path,
            timeout=240,
        )
        for secret in (TOKEN, KEYS["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def tars(archive: Path, tmp_path: Path) -> dict[str, bytes]:
    pack(archive, tmp_path / "expected")
    return contents(tmp_path / "expected")


def assert_holds(found: Mapping[str, bytes], archive: Path, tmp_path: Path, folder: str = "") -> None:
    """The packed form, and nothing but a card beside it."""
    expected = {folder + name: data for name, data in tars(archive, tmp_path).items()}
    assert {name: found.get(name) for name in expected} == expected
    assert not [name for name in found.keys() - expected.keys() if name.endswith((".tar", "manifest.json"))]


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_another_lab_gets_what_was_published_to_the_hub(archive: Path, hub: Hub, run: Run, tmp_path: Path):
    identity = open_archive(archive).id
    done = run("publish", archive, "hf://datasets/lab/r50/teachers", "--private", env=hub.environment())
    assert (done.returncode, done.stderr) == (0, "")
    address = f"hf://datasets/lab/r50@{identity[:16]}/teachers#sha256={identity}"
    assert done.stdout.splitlines()[-1] == address
    repository = hub.repositories["lab/r50"]
    assert repository.private
    assert_holds(repository.commits[repository.main], archive, tmp_path, "teachers/")
    assert len(repository.commits) == 2  # all files at once
    assert {auth for _, path, auth in hub.requests if path.startswith("/storage")} == {None}
    assert not list(archive.parent.glob("*.publishing"))
    for given in (address, f"hf://datasets/lab/r50/teachers#sha256={identity}"):
        fetched = run("fetch", given, tmp_path / "theirs", env=hub.environment())
        assert (fetched.returncode, fetched.stderr) == (0, "")
        assert contents(tmp_path / "theirs") == contents(archive)
    assert {auth for _, path, auth in hub.requests if path.startswith("/storage")} == {None}
    # again: nothing is sent, and it is published still
    before = hub.uploads()
    again = run("publish", archive, "hf://datasets/lab/r50/teachers", env=hub.environment())
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert (hub.uploads(), len(repository.commits)) == (before, 2)
