"""Every hostile archive is refused in one line, within a second of CPU time and 200 MB, by every entry point."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
from redistill_cache.errors import Damaged
from redistill_cache.verify import verify

from redistill import CachedTeacher
from tests.attacks.builders import exact_value
from tests.attacks.forge import documents, forge, reseal
from tests.attacks.hostile import ATTACKS, PARTIAL_ATTACKS, REASONS
from tests.attacks.measure import ENTRY_POINTS, Outcome, measure
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


def run_all_entry_points(path: Path) -> dict[str, Outcome]:
    """The outcome of each entry point, in its own process with an empty cache folder."""
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=measure, args=(path, path.parent / "cache", theirs))
    process.start()
    theirs.close()
    outcomes = []
    with ours:
        while len(outcomes) < len(ENTRY_POINTS):
            assert ours.poll(200), f"stuck at {list(ENTRY_POINTS)[len(outcomes)]!r}"
            outcomes.append(ours.recv())
    process.join()
    return {outcome.entry_point: outcome for outcome in outcomes}


def check_costs(outcomes: dict[str, Outcome]) -> None:
    for outcome in outcomes.values():
        assert "\n" not in outcome.result, outcome
        assert outcome.result.isprintable(), outcome
        assert len(outcome.result) < 1000, outcome
        assert outcome.seconds < 1.0, outcome
        assert outcome.megabytes < 200, outcome
        assert not outcome.outside, outcome


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_within_limits_of_time_and_memory(archive: Path, name: str):
    ATTACKS[name](archive)
    outcomes = run_all_entry_points(archive)
    assert outcomes["open"].result != "accepted"
    assert REASONS.get(name, "") in outcomes["open"].result
    check_costs(outcomes)


@pytest.mark.parametrize("name", PARTIAL_ATTACKS)
def test_refused_when_opened_with_allow_partial(archive: Path, name: str):
    PARTIAL_ATTACKS[name](archive)
    outcomes = run_all_entry_points(archive)
    assert outcomes["open"].result != "accepted"
    assert outcomes["open partial"].result != "accepted"
    assert REASONS.get(name, "") in outcomes["open partial"].result
    check_costs(outcomes)


def test_the_honest_archive_is_accepted(archive: Path):
    """The tools change nothing by themselves, so attacks are not refused because of a defect in the tools."""
    before = hashes(archive)
    forge(archive, *documents(archive))
    assert hashes(archive) == before
    reseal(archive)
    assert hashes(archive) == before
    outcomes = run_all_entry_points(archive)
    assert {outcome.result for outcome in outcomes.values()} == {"accepted"}
    check_costs(outcomes)
    assert hashes(archive) == before


def test_an_unsealed_archive_is_accepted_with_allow_partial(archive: Path):
    (archive / MANIFEST).unlink()
    outcomes = run_all_entry_points(archive)
    assert outcomes["open"].result.startswith("Incomplete")
    assert {outcomes[entry_point].result for entry_point in ("open partial", "verify", "resume")} == {"accepted"}


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_row_that_no_teacher_has_is_refused_wherever_rows_are_read(archive: Path, value: float):
    exact_value(value)(archive)
    opened = redistill_cache.open_archive(archive)
    where = r"teacher 'net', signal 'logits', view 0, row 3: expected finite values of at most 2\^100"
    reads: list[Callable[[], object]] = [
        lambda: opened.logits(0),
        lambda: opened.logits(0, [5, 3]),
        lambda: opened.load_view(0),
        lambda: CachedTeacher(opened)([5], 0),
    ]
    for read in reads:
        with pytest.raises(Damaged, match=where):
            read()
    assert np.isfinite(opened.logits(0, [4, 5])).all()
    assert verify(archive).ok  # every hash is right
    report = verify(archive, full=True)
    assert [(item.path, item.block) for item in report.damaged] == [
        ("teachers/net/logits", "teachers/net view 0 block 0")
    ]
    assert "row 3" in report.damaged[0].reason
