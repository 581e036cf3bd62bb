"""Every hostile archive is refused in one line, within a second of CPU time and 200 MB, through every door."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.attacks.forge import documents, forge, reseal
from tests.attacks.hostile import ATTACKS, PARTIAL_ATTACKS, REASONS
from tests.attacks.measure import DOORS, Passage, measure
from tests.faults.scenario import hashes, write_archive
from tests.faults.writer_process import context

MANIFEST = "_redistill/manifest.json"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "a.redistill.zarr"
    write_archive(path)
    return path


@pytest.fixture
def archive(honest: Path, tmp_path: Path) -> Path:
    path = tmp_path / "a.redistill.zarr"
    shutil.copytree(honest, path)
    return path


def all_doors(path: Path) -> dict[str, Passage]:
    """What came of each door, in a process of its own on a machine that has seen no archive before."""
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=measure, args=(path, path.parent / "cache", theirs))
    process.start()
    theirs.close()
    passages = []
    with ours:
        while len(passages) < len(DOORS):
            assert ours.poll(60), f"stuck at door {list(DOORS)[len(passages)]!r}"
            passages.append(ours.recv())
    process.join()
    return {passage.door: passage for passage in passages}


def check_costs(passages: dict[str, Passage]) -> None:
    for passage in passages.values():
        assert "\n" not in passage.verdict, passage
        assert passage.verdict.isprintable(), passage
        assert len(passage.verdict) < 1000, passage
        assert passage.seconds < 1.0, passage
        assert passage.megabytes < 200, passage
        assert not passage.strayed, passage


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_quickly_and_cheaply(archive: Path, name: str):
    ATTACKS[name](archive)
    passages = all_doors(archive)
    assert passages["open"].verdict != "believed"
    assert REASONS.get(name, "") in passages["open"].verdict
    check_costs(passages)


@pytest.mark.parametrize("name", PARTIAL_ATTACKS)
def test_refused_when_opened_partly(archive: Path, name: str):
    PARTIAL_ATTACKS[name](archive)
    passages = all_doors(archive)
    assert passages["open"].verdict != "believed"
    assert passages["open partly"].verdict != "believed"
    assert REASONS.get(name, "") in passages["open partly"].verdict
    check_costs(passages)


def test_the_honest_archive_is_believed(archive: Path):
    """Else every attack would be refused for nothing: the tools of the attacker change nothing by themselves."""
    before = hashes(archive)
    forge(archive, *documents(archive))
    assert hashes(archive) == before
    reseal(archive)
    assert hashes(archive) == before
    passages = all_doors(archive)
    assert {passage.verdict for passage in passages.values()} == {"believed"}
    check_costs(passages)
    assert hashes(archive) == before


def test_an_unsealed_archive_is_believed_partly(archive: Path):
    (archive / MANIFEST).unlink()
    passages = all_doors(archive)
    assert passages["open"].verdict.startswith("Incomplete")
    assert {passages[door].verdict for door in ("open partly", "verify", "resume")} == {"believed"}
