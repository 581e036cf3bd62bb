"""Publishing to each kind of place, by the command, its own process and real servers; and use by another lab."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.errors import Refused
from redistill_cache.packing import pack
from redistill_cache.wording import human_bytes

from redistill.sharing.publishing import publish
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
    card = repository.commits[repository.main]["teachers/README.md"].decode()
    assert f"redistill archive fetch '{address}' " in card
    assert_holds(repository.commits[repository.main], archive, tmp_path, "teachers/")
    assert len(repository.commits) == 2  # all files at once
    assert {auth for _, path, auth in hub.requests if path.startswith("/storage")} == {None}
    assert not list(archive.parent.glob("*.publishing"))
    fetched = run("fetch", address, tmp_path / "theirs", env=hub.environment())
    assert (fetched.returncode, fetched.stderr) == (0, "")
    assert contents(tmp_path / "theirs") == contents(archive)
    assert {auth for _, path, auth in hub.requests if path.startswith("/storage")} == {None}


@pytest.mark.slow
def test_large_files_get_to_the_hub_by_xet(archive: Path, hub: Hub, run: Run, tmp_path: Path):
    """As they do where its package is installed; they are read by their addresses as ever."""
    pytest.importorskip("hf_xet")
    files = [data for name, data in tars(archive, tmp_path).items() if name.endswith(".tar")]
    hub.known = {hashlib.sha256(data).hexdigest(): data for data in files}
    for _ in range(2):
        done = run("publish", archive, "hf://datasets/lab/r50", env=hub.environment(xet=True))
        assert (done.returncode, done.stderr) == (0, "")
    assert sorted(hub.uploads) == sorted(hub.known)
    assert not [path for _, path, _ in hub.requests if path.endswith("/objects/batch")]
    assert TOKEN not in str([auth for _, path, auth in hub.requests if path.startswith("/v")])
    fetched = run("fetch", done.stdout.splitlines()[-1], tmp_path / "theirs", env=hub.environment(xet=True))
    assert fetched.returncode == 0
    assert contents(tmp_path / "theirs") == contents(archive)


@pytest.mark.slow
def test_what_is_published_already_is_not_sent_again(archive: Path, hub: Hub, run: Run, tmp_path: Path):
    done = run("publish", archive, "hf://datasets/lab/r50", env=hub.environment())
    hub.repositories["lab/r50"].tags.clear()  # as if the command had ended before it set the tag
    again = run("publish", archive, "hf://datasets/lab/r50", env=hub.environment())
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
    repository = hub.repositories["lab/r50"]
    assert (len(hub.uploads), len(repository.commits), len(repository.tags)) == (4, 2, 1)
    fetched = run("fetch", "hf://datasets/lab/r50", tmp_path / "theirs", env=hub.environment())
    assert fetched.returncode == 0
    assert contents(tmp_path / "theirs") == contents(archive)


@pytest.mark.slow
def test_nothing_is_sent_before_an_archive_states_its_terms(hub: Hub, run: Run, tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    tiny_archive.make(path, replace(STATED, licence="", citation=""))
    place = "hf://datasets/lab/r50"
    for dry in ([], ["--dry-run"]):
        refused = run("publish", path, place, *dry, env=hub.environment())
        assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
        advice = f"missing licence, citation; redistill archive edit {path} --licence SPDX --citation TEXT"
        assert refused.stderr.strip().endswith(advice)
    assert not hub.requests
    ArchiveWriter.resume(path).edit_terms(licence="CC-BY-4.0", citation="Nobody (2026)")
    dry_run = run("publish", path, place, "--dry-run", env=hub.environment())
    size = sum(len(data) for name, data in tars(path, tmp_path).items() if name.endswith(".tar"))
    assert dry_run.stdout == f"{place}: would get 5 files, {human_bytes(size)} (packed), and the card\n"
    assert (dry_run.returncode, hub.requests) == (0, [])


@pytest.mark.slow
def test_what_is_wrong_is_refused_before_anything_is_sent(archive: Path, hub: Hub, run: Run, tmp_path: Path):
    place = "hf://datasets/lab/r50"
    for token in ("", "hf_wrong"):
        refused = run("publish", archive, place, env=hub.environment() | {"HF_TOKEN": token})
        assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
        assert "the token, which 'hf auth login' or HF_TOKEN gives" in refused.stderr
        assert "hf_wrong" not in refused.stdout + refused.stderr
    away = run("publish", archive, place, env=hub.environment() | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (away.returncode, away.stderr.count("\n")) == (3, 1)
    for wrong in ("hf://lab/r50", "hf://datasets/lab", "hf://datasets/lab/r50@main", "https://host/a", "s3://"):
        assert run("publish", archive, wrong, env=hub.environment()).returncode == 2
    assert run("publish", archive, tmp_path / "out", "--replace", env=hub.environment()).returncode == 3
    shard = next((archive / "views/crop").glob("c.1.*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    damaged = run("publish", archive, place, env=hub.environment())
    assert (damaged.returncode, damaged.stderr.count("\n")) == (4, 1)
    assert "views/crop/c.1" in damaged.stderr
    assert not hub.repositories
    assert {method for method, path, _ in hub.requests if "paths-info" not in path} == {"GET"}


@pytest.mark.slow
def test_an_archive_replaces_another_one_on_request_which_stays_under_its_tag(
    archive: Path, hub: Hub, run: Run, tmp_path: Path
):
    env = hub.environment()
    first = run("publish", archive, "hf://datasets/lab/r50", env=env).stdout.splitlines()[-1]
    other = tmp_path / "mine" / "b.redistill.zarr"
    tiny_archive.make(other, replace(STATED, num_views=2, seed=8))
    refused = run("publish", other, "hf://datasets/lab/r50", env=env)
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    assert "holds another archive; replace it with --replace" in refused.stderr
    second = run("publish", other, "hf://datasets/lab/r50", "--replace", env=env).stdout.splitlines()[-1]
    repository = hub.repositories["lab/r50"]
    assert_holds(repository.commits[repository.main], other, tmp_path)
    for address, made in ((first, archive), (second, other)):
        run("fetch", address, tmp_path / made.name, env=env)
        assert contents(tmp_path / made.name) == contents(made)
    # the first one again, in another folder: the tag leads to where the address says that it is
    third = run("publish", archive, "hf://datasets/lab/r50/old", env=env).stdout.splitlines()[-1]
    assert third == first.replace("#", "/old#")
    assert run("fetch", third, tmp_path / "third", env=env).returncode == 0
    assert contents(tmp_path / "third") == contents(archive)


def publish_and_kill(archive: Path, hub: Hub, tmp_path: Path, at: int) -> int:
    """Publish, and kill -9 the command when it makes its request number `at`; the number of requests it made."""
    reached, ended = threading.Event(), threading.Event()
    first = len(hub.requests)

    def hold(method: str, path: str) -> None:
        if len(hub.requests) - first >= at:
            reached.set()
            ended.wait(60)
            raise ConnectionError("killed")

    hub.before = hold
    process = subprocess.Popen(
        command("publish", archive, "hf://datasets/lab/r50"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path, hub.environment()),
    )
    while process.poll() is None and not reached.wait(0.02):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    hub.before = lambda _, __: None
    ended.set()
    return len(hub.requests) - first


@pytest.mark.slow
def test_publishing_continues_after_kill_9_at_every_request(archive: Path, hub: Hub, run: Run, tmp_path: Path):
    for at in range(1, 40):
        sent = set(hub.large)
        repository = hub.repositories.get("lab/r50")
        whole = repository is not None and len(repository.commits) > 1
        made = publish_and_kill(archive, hub, tmp_path, at)
        assert set(hub.large) >= sent
        if repository is not None and not whole:  # one commit, or nothing that is seen
            assert len(repository.commits) <= 2
        if made < at:
            break
    else:
        pytest.fail("the command never came to its end")
    assert len(hub.uploads) == len(hub.large) == 4  # nothing was sent twice
    done = run("publish", archive, "hf://datasets/lab/r50", env=hub.environment())
    assert done.returncode == 0
    assert_holds(hub.repositories["lab/r50"].commits[hub.repositories["lab/r50"].main], archive, tmp_path)
    assert not list(archive.parent.glob("*.publishing"))


@pytest.mark.slow
def test_a_hub_that_fails_is_one_line_and_the_same_command_continues(archive: Path, hub: Hub, run: Run, tmp_path: Path):
    def fail(method: str, path: str) -> None:
        if path.endswith("/commit/main"):
            raise ConnectionError("gone")

    hub.before = fail
    failed = run("publish", archive, "hf://datasets/lab/r50", env=hub.environment())
    assert (failed.returncode, failed.stderr.count("\n")) == (3, 1)
    assert "what has arrived is kept" in failed.stderr
    hub.before = lambda _, __: None
    sent = len(hub.uploads)
    assert run("publish", archive, "hf://datasets/lab/r50", env=hub.environment()).returncode == 0
    assert len(hub.uploads) == sent == 4


# -- buckets and folders ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_lab_gets_what_was_published_to_a_bucket(archive: Path, run: Run, tmp_path: Path):
    pytest.importorskip("moto")
    identity = open_archive(archive).id
    with s3_server(tmp_path) as env:
        refused = run("publish", archive, "s3://none/a.redistill", env=env)
        assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
        for _ in range(2):
            done = run("publish", archive, "s3://lab/r50/a.redistill", env=env)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.splitlines()[-1] == f"s3://lab/r50/a.redistill#sha256={identity}"
        assert_holds(objects(env, "r50/a.redistill"), archive, tmp_path)
        fetched = run("fetch", f"s3://lab/r50/a.redistill#sha256={identity}", tmp_path / "theirs", env=env)
    assert fetched.returncode == 0
    assert contents(tmp_path / "theirs") == contents(archive)


@pytest.mark.slow
def test_another_lab_gets_what_was_published_to_a_folder(archive: Path, run: Run, tmp_path: Path, serve):
    """Which any web server serves."""
    identity = open_archive(archive).id
    out = tmp_path / "shared" / "a.redistill"
    for _ in range(2):
        done = run("publish", archive, out, env={})
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == f"{out}#sha256={identity}"
    assert_holds(contents(out), archive, tmp_path)
    address, _ = serve(out.parent)
    fetched = run("fetch", f"{address}/a.redistill#sha256={identity}", tmp_path / "theirs", env={})
    assert fetched.returncode == 0
    assert contents(tmp_path / "theirs") == contents(archive)


def test_a_folder_gets_an_archive_that_states_its_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, out = tmp_path / "a.redistill.zarr", tmp_path / "out"
    tiny_archive.make(path, replace(STATED, licence=""))
    with pytest.raises(Refused, match=r"is not published: missing licence; redistill archive edit .* --licence SPDX$"):
        publish(path, str(out))
    assert not out.exists()
    identity = ArchiveWriter.resume(path).edit_terms(licence="CC-BY-4.0")
    assert publish(path, str(out)) == f"{out}#sha256={identity}"
    assert f"redistill archive fetch 'ADDRESS#sha256={identity}' " in (out / "README.md").read_text()
    assert_holds(contents(out), path, tmp_path)
    with pytest.raises(Refused, match=r"out is the packed form; publish the archive itself"):
        publish(out, str(tmp_path / "again"))
