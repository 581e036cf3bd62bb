"""Damaged files of a finished archive: reads are correct or refused, and verify reports the damage."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redistill_cache.errors import Damaged, RedistillError, Refused
from redistill_cache.verify import verify

from tests.faults.scenario import SAMPLES, VIEWS, count_correct_rows, write_archive

ALL_ROWS = SAMPLES * VIEWS


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.redistill.zarr"
    write_archive(path)
    return path


def files_of(archive: Path) -> list[Path]:
    return sorted(path for path in archive.rglob("*") if path.is_file())


def is_metadata(path: Path) -> bool:
    return path.suffix == ".json"


@contextmanager
def empty_cache(archive: Path) -> Iterator[None]:
    """Empty the cache folder, as if the archive had just been copied to this machine."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    yield


def check_damage_is_detected(archive: Path, what: str) -> None:
    """Reading returns only correct values or raises a RedistillError, and a full verification reports damage."""
    with empty_cache(archive):
        message = error_message(lambda: count_correct_rows(archive) == ALL_ROWS)
        assert "\n" not in message, what
    with empty_cache(archive):
        assert error_message(lambda: not verify(archive, full=True).ok), f"{what}: verify reported nothing"


def error_message(check: Callable[[], bool]) -> str:
    """The message of the error that `check` raises; "no error" if it returns, which must be with a true value."""
    try:
        assert check()
    except RedistillError as error:
        return str(error)
    return "no error"


def flip_bits(archive: Path, files: list[Path], count: int, seed: int) -> None:
    """Flip single bits, spread over all bytes of the files, one at a time."""
    rng = random.Random(seed)
    for path in rng.choices(files, weights=[path.stat().st_size for path in files], k=count):
        whole = path.read_bytes()
        data = bytearray(whole)
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        check_damage_is_detected(archive, f"bit {bit} of byte {at} of {path.relative_to(archive)} (seed {seed})")
        path.write_bytes(whole)


def test_flipped_bits_of_data(archive: Path):
    flip_bits(archive, [path for path in files_of(archive) if not is_metadata(path)], 60, seed=1)


def test_flipped_bits_of_metadata(archive: Path):
    flip_bits(archive, [path for path in files_of(archive) if is_metadata(path)], 100, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_1200_flipped_bits_of_data(archive: Path):
    flip_bits(archive, [path for path in files_of(archive) if not is_metadata(path)], 1200, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_2000_flipped_bits_of_metadata(archive: Path):
    flip_bits(archive, [path for path in files_of(archive) if is_metadata(path)], 2000, seed=4)


def sample_files(archive: Path) -> list[Path]:
    """A file of every kind: the first of each folder, and of each suffix in it."""
    groups = itertools.groupby(files_of(archive), key=lambda path: (path.parent, path.suffix == ".json"))
    return [next(group) for _, group in groups]


def test_truncated_and_extended_files(archive: Path):
    for path in sample_files(archive):
        whole = path.read_bytes()
        for length in sorted({0, 1, len(whole) // 2, len(whole) - 1}):
            path.write_bytes(whole[:length])
            check_damage_is_detected(archive, f"{path.relative_to(archive)} cut to {length} of {len(whole)} bytes")
        path.write_bytes(whole + b"\0")
        check_damage_is_detected(archive, f"{path.relative_to(archive)} with an extra byte")
        path.write_bytes(whole)


def test_deleted_files(archive: Path):
    for path in files_of(archive):
        whole = path.read_bytes()
        path.unlink()
        if path.name == "manifest.json":
            with pytest.raises(Refused, match="never sealed"):
                count_correct_rows(archive)
        else:
            check_damage_is_detected(archive, f"{path.relative_to(archive)} deleted")
        path.write_bytes(whole)


def test_a_file_deleted_after_verification_is_missing_when_it_is_read(archive: Path):
    assert count_correct_rows(archive) == ALL_ROWS
    (archive / "teachers/net/logits/q/c.1.0.0").unlink()
    with pytest.raises(Damaged, match="is missing"):
        count_correct_rows(archive)


def test_swapped_files_of_equal_size(archive: Path):
    shards = [path for path in files_of(archive) if not is_metadata(path)]
    pairs = [(a, b) for a, b in itertools.combinations(shards, 2) if a.stat().st_size == b.stat().st_size]
    pairs = [(a, b) for a, b in pairs if a.read_bytes() != b.read_bytes()]
    assert pairs, "the scenario must have shards of equal size"
    for a, b in pairs:
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        check_damage_is_detected(archive, f"{a.relative_to(archive)} and {b.relative_to(archive)} swapped")
        a.write_bytes(first)
        b.write_bytes(second)


def test_an_old_shard_copied_back(archive: Path):
    """A valid shard with correct checksums in place of the committed one."""
    path = archive / "teachers/net/logits/q/c.1.0.0"
    whole = path.read_bytes()
    path.write_bytes((archive / "teachers/net/logits/q/c.0.0.0").read_bytes())
    check_damage_is_detected(archive, "a shard of another view")
    path.write_bytes(whole)


def test_a_commit_record_under_another_name(archive: Path):
    record = archive / "_redistill/blocks/views.0.0.json"
    other = archive / "_redistill/blocks/views.1.0.json"
    whole = other.read_bytes()
    other.write_bytes(record.read_bytes())
    check_damage_is_detected(archive, "the record of one block in place of another's")
    other.write_bytes(whole)
    (archive / "_redistill/blocks/views.7.0.json").write_bytes(record.read_bytes())
    check_damage_is_detected(archive, "an extra record")


def test_records_of_an_unsealed_archive(archive: Path):
    """Without a manifest only the records describe the files: a flipped bit in one must be detected."""
    (archive / "_redistill/manifest.json").unlink()
    rng = random.Random(5)
    records = sorted((archive / "_redistill/blocks").iterdir())
    for path in rng.choices(records, k=40):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises((Damaged, Refused)):
            count_correct_rows(archive, partial=True)
        path.write_bytes(whole)
    assert count_correct_rows(archive, partial=True) == ALL_ROWS
