"""kill -9 of pack and fetch at random moments; then the same command gives the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache import layout, open_archive
from redistill_cache.errors import RedistillError
from redistill_cache.packing import pack
from redistill_cache.verify import verify

from tests import tiny_archive
from tests.flaky_server import Flaky, Request, serving
from tests.tiny_archive import contents

SEED = int(os.environ.get("REDISTILL_SEED", "20261126"))
TEACHERS = ("other", "tiny")
# Says that it begins, so that importing does not count as running.
PACK = "import sys; from pathlib import Path; from redistill_cache.packing import pack; print('now', flush=True); "
PACK += "pack(Path(sys.argv[1]), Path(sys.argv[2]))"
FETCH = "import sys; from redistill_cache import fetch_archive; print('now', flush=True); "
FETCH += "fetch_archive(sys.argv[1], sys.argv[2], views=int(sys.argv[3]) or None, teachers=sys.argv[4:] or None)"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_archive.make(tmp_path / "a", replace(tiny_archive.SPEC, num_views=5), TEACHERS)
    return tmp_path / "a"


def run(
    code: str,
    *arguments: object,
    seconds: float | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> float | None:
    """Run a process, or kill it after so many seconds; the seconds that it took, None if it was killed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        start = time.monotonic()
        try:
            _, err = process.communicate(timeout=300 if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
    assert process.returncode == 0, err
    return time.monotonic() - start


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_often(
    command: Callable[[float | None], float | None], check: Callable[[], None], out: Path, rounds: int
) -> None:
    """Kill the command in every round, at a moment of its usual time; check what is there; then let it end."""
    print(f"replay with REDISTILL_SEED={SEED}")
    draw = random.Random(SEED)
    duration = command(None) or 0.0
    for number in range(rounds):
        killed = False
        while not killed:
            shutil.rmtree(out)
            moment = draw.random() * duration
            took = command(moment)
            killed = took is None
            duration = min(duration, took or duration)
            check()
        print(f"round {number}: killed after {moment:.3f} s")
        if draw.random() < 0.5:
            command(draw.random() * duration)
            check()
        command(None)
        check()
        assert not list(out.rglob("*.partial"))
        assert not list(out.rglob("*documents-*"))


def kill_pack(source: Path, tmp_path: Path, rounds: int) -> None:
    out = tmp_path / "p"
    pack(source, tmp_path / "reference")
    expected = files(tmp_path / "reference")

    def check() -> None:
        whole = (
            {name: data for name, data in files(out).items() if not name.endswith(".partial")} if out.exists() else {}
        )
        assert whole.items() <= expected.items()
        assert "manifest.json" not in whole or whole == expected

    def command(seconds: float | None) -> float | None:
        took = run(PACK, source, out, seconds=seconds)
        out.mkdir(exist_ok=True)
        assert took is None or files(out) == expected
        return took

    kill_often(command, check, out, rounds)


def kill_fetch(
    source: Path, tmp_path: Path, form: str, views: int, rounds: int, teachers: Sequence[str] = TEACHERS
) -> None:
    """From a server that is slow enough for a kill in the middle; what is there is offered, or nothing."""
    out = tmp_path / "out"
    sent = source
    if form == "packed":
        sent = tmp_path / "a.redistill"
        pack(source, sent)
    expected = contents(source)

    def is_asked_for(name: str) -> bool:
        return (layout.view_of_file(name) or 0) < (views or 5) and layout.teacher_of_file(name) in (None, *teachers)

    def fault(number: int, request: Request) -> str | None:
        return random.Random(f"{number} {request.path}").choice(["slow", "short", None, None, None, None])

    def check() -> None:
        try:
            archive = open_archive(out, verify="full")
        except RedistillError as error:
            print(error)
            return
        assert archive.num_views == (views or 5)
        assert tuple(archive.teachers) == tuple(teachers)
        for view in range(archive.num_views):
            for teacher in teachers:
                archive.logits(view, teacher=teacher)

    def command(seconds: float | None) -> float | None:
        chosen = () if teachers == TEACHERS else teachers
        took = run(FETCH, f"{flaky.address}/x", out, views, *chosen, seconds=seconds)
        out.mkdir(exist_ok=True)
        if took is not None:
            assert verify(out, full=True).ok
            here = {name: data for name, data in contents(out).items() if name != "_redistill/copy.json"}
            assert here == {name: data for name, data in expected.items() if is_asked_for(name)}
        return took

    served = {f"x/{path.relative_to(sent)}": path.read_bytes() for path in sent.rglob("*") if path.is_file()}
    with serving(Flaky(served, fault)) as flaky:
        kill_often(command, check, out, rounds)


@pytest.mark.timeout(600)
def test_killed_packs(source: Path, tmp_path: Path):
    kill_pack(source, tmp_path, 3)


@pytest.mark.timeout(600)
def test_killed_fetches(source: Path, tmp_path: Path):
    kill_fetch(source, tmp_path, "packed", 0, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_killed_packs(source: Path, tmp_path: Path):
    kill_pack(source, tmp_path, 40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("form", "views", "teachers"),
    [
        ("tree", 0, TEACHERS),
        ("packed", 0, TEACHERS),
        ("packed", 2, TEACHERS),
        ("tree", 2, ("tiny",)),
        ("packed", 0, ("tiny",)),
    ],
)
def test_thirty_killed_fetches(source: Path, tmp_path: Path, form: str, views: int, teachers: Sequence[str]):
    kill_fetch(source, tmp_path, form, views, 30, teachers)
