"""verify reports every damaged file with its block; quarantine moves damaged blocks aside to be rewritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.errors import Damaged, Incomplete, NotAnArchive
from redistill_cache.strict_json import canonical
from redistill_cache.verify import VerifyReport, quarantine, verify

from tests.attacks.forge import read_manifest, reseal
from tests.tiny_archive import SPEC, contents, fill, stored_logits

SHARD = "teachers/tiny/logits/values/c.1.2.0"
BLOCK = "teachers/tiny view 1 block 2"


def flip(file: Path, at: int = 0) -> None:
    """Flip one bit, and restore the modification time."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def manifest(archive: Path) -> bytes:
    return (archive / "_redistill/manifest.json").read_bytes()


def damaged(report: VerifyReport) -> dict[str, tuple[str | None, str]]:
    return {file.path: (file.block, file.reason) for file in report.damaged}


def test_an_undamaged_archive_is_ok(archive_copy: Path):
    calls: list[tuple[int, int]] = []
    report = verify(archive_copy, progress=lambda done, total: calls.append((done, total)))
    assert report.ok
    assert report.checked_files == len(contents(archive_copy)) - 1 == calls[-1][0] == calls[-1][1] == len(calls)
    assert report.to_json() == {
        "ok": True,
        "checked_files": report.checked_files,
        "damaged": [],
        "hashed_files": report.checked_files,
        "hashed_bytes": sum(map(len, contents(archive_copy).values())) - len(manifest(archive_copy)),
        "missing_blocks": None,
        "canaries_per_view": SPEC.canaries_per_view,
        "views": SPEC.num_views,
        "sealed_views": SPEC.num_views,
        "lacking": {},
        "has_signature": False,
        "alignment": None,
    }
    again = verify(archive_copy)
    assert (again.ok, again.hashed_files, again.hashed_bytes) == (True, 0, 0)
    full = verify(archive_copy, full=True)
    assert (full.hashed_files, full.hashed_bytes) == (report.hashed_files, report.hashed_bytes)


@pytest.mark.parametrize("opened_before", [False, True])
def test_every_damaged_file_is_reported_with_its_block(archive_copy: Path, opened_before: bool):
    if opened_before:
        assert verify(archive_copy).ok
    for name in (SHARD, "canaries/pixels/c.0.0.0.0.0", "samples/label/c.0", "_redistill/blocks/views.2.1.json"):
        flip(archive_copy / name, 20)
    flip(archive_copy / "views/crop/zarr.json", 20)
    (archive_copy / "views/flip/c.0.3").unlink()
    with (archive_copy / "views/crop/c.0.3.0").open("ab") as file:
        file.write(b"x")
    (archive_copy / "views/extra").write_bytes(b"x")
    size = (archive_copy / "views/crop/c.0.3.0").stat().st_size
    wrong = "does not have the SHA-256 that was committed"
    assert damaged(verify(archive_copy, full=True)) == {
        SHARD: (BLOCK, wrong),
        "canaries/pixels/c.0.0.0.0.0": ("canaries view 0 block 0", wrong),
        "samples/label/c.0": ("samples view 0 block 0", wrong),
        "_redistill/blocks/views.2.1.json": ("views view 2 block 1", wrong),
        "views/crop/zarr.json": (None, wrong),
        "views/flip/c.0.3": ("views view 0 block 3", "is missing"),
        "views/crop/c.0.3.0": ("views view 0 block 3", f"has {size} bytes, {size - 1} were committed"),
        "views/extra": (None, "is not in the manifest; remove it"),
    }
    with pytest.raises(Damaged, match="'redistill verify' lists everything"):
        open_archive(archive_copy)


def test_a_verified_file_is_hashed_again_after_a_change_or_with_full(archive_copy: Path):
    assert verify(archive_copy).ok
    flip(archive_copy / SHARD, 20)  # restores size and modification time, which no program can do with the change time
    assert damaged(verify(archive_copy)).keys() == {SHARD}
    assert damaged(verify(archive_copy, full=True)).keys() == {SHARD}
    with pytest.raises(Damaged, match="1 files are damaged"):
        open_archive(archive_copy, verify="full")


def test_quarantined_blocks_are_rewritten(archive_copy: Path):
    before = contents(archive_copy)
    identity = open_archive(archive_copy).id
    flip(archive_copy / SHARD, 20)
    report = verify(archive_copy, full=True)
    assert quarantine(archive_copy, report.damaged) == [BLOCK]
    aside = {file.name for file in (archive_copy / "_redistill/quarantine").rglob("*") if file.is_file()}
    assert SHARD.replace("/", ".") in aside
    with pytest.raises(Incomplete):
        open_archive(archive_copy)
    writer = ArchiveWriter.resume(archive_copy, SPEC)
    assert [str(block) for block in writer.missing("teachers/tiny")] == [BLOCK]
    fill(writer)
    assert writer.seal() == identity
    assert {name: data for name, data in contents(archive_copy).items() if "quarantine" not in name} == before
    assert verify(archive_copy, full=True).ok
    assert np.array_equal(open_archive(archive_copy).logits(1), stored_logits(1))


def test_quarantine_moves_only_files_of_blocks(archive_copy: Path):
    before = contents(archive_copy)
    assert quarantine(archive_copy, verify(archive_copy).damaged) == []
    (archive_copy / "unknown").write_bytes(b"")
    assert quarantine(archive_copy, verify(archive_copy).damaged) == []
    (archive_copy / "unknown").unlink()
    assert contents(archive_copy) == before


def test_the_committed_blocks_of_an_unfinished_archive_are_verified(archive_copy: Path):
    (archive_copy / "_redistill/manifest.json").unlink()
    report = verify(archive_copy, full=True)
    assert (report.ok, report.damaged, report.missing_blocks) == (False, (), 0)
    flip(archive_copy / SHARD, 20)
    assert damaged(verify(archive_copy, full=True)) == {SHARD: (BLOCK, "does not have the SHA-256 that was committed")}
    (archive_copy / SHARD).unlink()
    report = verify(archive_copy, full=True)  # a block without its files is not committed; it will be rewritten
    assert (report.ok, report.damaged, report.missing_blocks) == (False, (), 1)


def test_an_archive_that_cannot_be_opened_is_one_damaged_file(archive_copy: Path, tmp_path: Path):
    flip(archive_copy / "_redistill/manifest.json", 40)
    (file,) = verify(archive_copy).damaged
    assert (file.path, file.block) == (str(archive_copy), None)
    assert "does not match its own hash" in str(file)
    with pytest.raises(NotAnArchive):
        verify(tmp_path)


def test_statistics_that_the_commit_records_do_not_add_up_to_are_reported(archive_copy: Path):
    stated = read_manifest(archive_copy).teachers["tiny"]
    flattered = stated["logits"] | {"top1_kept": stated["logits"]["top1_kept"] - 1}
    reseal(archive_copy, teachers={"tiny": dict(stated) | {"logits": flattered}})
    assert open_archive(archive_copy).complete  # a reader of the manifest alone cannot know
    assert damaged(verify(archive_copy)) == {
        "_redistill/manifest.json": (
            None,
            "does not state the statistics of teacher 'tiny' that its commit records add up to",
        )
    }


def test_statistics_of_a_record_that_cannot_be_of_its_block_are_reported(archive_copy: Path):
    record = archive_copy / "_redistill/blocks/teachers.tiny.1.0.json"
    value = json.loads(record.read_bytes())
    value["stats"]["logits"]["rows"] = 17
    record.write_bytes(canonical(value))
    reseal(archive_copy)
    (found,) = damaged(verify(archive_copy)).items()
    assert found[0] == "_redistill/blocks"
    assert "are not of 17 rows" in found[1][1]
