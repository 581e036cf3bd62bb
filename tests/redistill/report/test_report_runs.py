"""Runs are read strictly, grouped by everything but the seed, and counted once."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from redistill_cache.errors import Refused

from redistill.report import write_report
from redistill.report.runs import group_runs, read_runs
from tests.attacks.test_hostile_config import ATTACKS as HOSTILE

HOSTILE_NAMES = (
    "key of 50,000 parts",
    "arrays of depth 2,000",
    "a hexadecimal integer that cannot be printed",
    "a pipe",
)


def copy_run(run: Path, to: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a run, with some text of its config.toml replaced."""
    shutil.copytree(run, to)
    config = (to / "config.toml").read_text()
    for old, new in changes:
        assert old in config
        config = config.replace(old, new)
    (to / "config.toml").write_text(config)
    return to


def test_seeds_are_one_group_and_other_settings_are_not(cohort: Path, tmp_path: Path):
    longer = copy_run(cohort / "ce-0", tmp_path / "longer", ("epochs = 2", "epochs = 9"), ("lr = 0.05", "lr = 0.4"))
    groups, notes = group_runs(read_runs([cohort, longer]).finished)
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("ce · epochs 2 · lr 0.05", 2),
        ("power · epochs 2 · lr 0.05", 2),
        ("ce · epochs 9 · lr 0.4", 1),
    ]
    assert not notes
    ce, power, other = (group.style for group in groups)
    assert ce.colour == other.colour != power.colour
    assert ce.dash == power.dash != other.dash


def test_a_duplicate_run_is_counted_once(cohort: Path, tmp_path: Path):
    """Whether by its path or as a copy, and on whatever device it ran."""
    runs = cohort
    assert len(read_runs([runs, runs / "ce-0", runs / ".." / "runs"]).finished) == 4
    again = copy_run(runs / "ce-0", tmp_path / "again", ('device = "auto"', 'device = "cuda:1"'))
    written = write_report([runs, again], tmp_path / "p.html")
    assert (written.runs, written.groups) == (4, 2)
    assert [note.partition(" is the same run as ")[0] for note in written.notes] == [str(again)]


def cut(file: Path, characters: int, end: str = "") -> None:
    file.write_text(file.read_text()[:-characters] + end)


def set_result(**changes: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | changes))

    return change


def set_evaluation(**changes: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        evaluation = json.loads((run / "result.json").read_text())["evaluation"]
        set_result(evaluation=evaluation | changes)(run)

    return change


BIN = {"low": 0.0, "high": 1.0, "rows": 3, "confidence": 0.5, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "result.json").unlink(), "not finished"),
        (lambda run: cut(run / "metrics.csv", 3), "in the middle of a line"),
        (lambda run: cut(run / "metrics.csv", 30, "\n"), "line 3: expected one value for each column"),
        (lambda run: (run / "metrics.csv").write_text("epoch,val_top1\n1,1e300\n"), "line 2: val_top1: .* 1e.300"),
        (lambda run: (run / "metrics.csv").write_text("epoch,val_top1\n1,nan\n"), "line 2: val_top1: .* nan"),
        (lambda run: (run / "metrics.csv").write_text("epoch,val_top1\n1,good\n"), "line 2: val_top1: .* 'good'"),
        (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), "line 2: the epoch is missing"),
        (lambda run: (run / "config.toml").write_text("options = 3"), "not a readable run"),
        (lambda run: (run / "config.toml").write_text("[options]\nval = 3\n"), "config.toml: 'val' must be a string"),
        (lambda run: (run / "result.json").write_text("{"), "not a readable run"),
        (lambda run: (run / "result.json").write_text("{}"), "not a readable run"),
        (lambda run: (run / "result.json").write_text("[]"), "expected an object"),
        (set_result(student="x" * 5000), "'student' must be a string of at most 4096 characters"),
        (set_result(seed=True), "'seed' must be an integer"),
        (set_result(top1="0.5"), "'top1' must be a number"),
        (set_result(nll=1e200), "'nll' must be a number"),
        (set_result(evaluation=[]), "'evaluation' must be an object"),
        (set_evaluation(per_class=[0.5, "x"]), "per_class: '1' must be a number"),
        (set_evaluation(teacher=3), "'teacher' must be an object"),
        (set_evaluation(reliability=[3]), "reliability 0: expected an object"),
        (set_evaluation(reliability=[BIN | {"high": 0.0}]), "reliability 0: 'high' must be above 0"),
        (set_evaluation(reliability=[BIN | {"rows": -1}]), "reliability 0: 'rows' must be an integer from 0"),
    ],
)
def test_a_damaged_run_is_listed_by_name_and_the_others_are_shown(cohort: Path, tmp_path: Path, damage, message: str):
    run = tmp_path / "run"
    shutil.copytree(cohort / "ce-0", run)
    (run / "last.ckpt").write_bytes(b"")
    damage(run)
    with pytest.raises(Refused, match=message) as error:
        write_report([run], tmp_path / "p.html")
    assert str(run) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "p.html").exists()
    written = write_report([cohort, run], tmp_path / "p.html")
    assert (written.runs, written.groups) == (4, 2)
    (note,) = written.notes
    assert note.startswith(f"{run} is not ")
    assert re.search(message, note)
    assert "not readable" in (tmp_path / "p.html").read_text() or "not finished" in note


@pytest.mark.parametrize("hostile", [HOSTILE[name] for name in HOSTILE_NAMES], ids=HOSTILE_NAMES)
def test_a_hostile_config_does_not_prevent_the_report_of_the_other_runs(cohort: Path, tmp_path: Path, hostile):
    run = tmp_path / "run"
    shutil.copytree(cohort / "ce-0", run)
    (run / "config.toml").unlink()
    attack, message = hostile
    attack(run / "config.toml")
    written = write_report([cohort, run], tmp_path / "p.html")
    assert written.runs == 4
    (note,) = written.notes
    assert re.search(f"{run} is not a readable run: .*{message}", note)


@pytest.mark.parametrize("name", ["metrics.csv", "result.json"])
def test_a_pipe_in_a_run_does_not_wait(cohort: Path, tmp_path: Path, name: str):
    run = tmp_path / "run"
    shutil.copytree(cohort / "ce-0", run)
    (run / name).unlink()
    os.mkfifo(run / name)
    (note,) = write_report([cohort, run], tmp_path / "p.html").notes
    assert note.startswith(f"{run} is not ")


def test_a_damaged_config_of_an_unfinished_run_has_a_reason(cohort: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("options = [")
    (note,) = write_report([cohort, run], tmp_path / "p.html").notes
    assert note.startswith(f"{run} is not finished, and its files cannot be read")


def test_metrics_that_were_not_measured_are_left_out(cohort: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(cohort / "ce-0", run)
    set_evaluation(teacher=None, per_class=[0.5, None], reliability=[])(run)
    (record,) = read_runs([run]).finished
    assert record.per_class == (0.5, None)
    assert record.bins == ()
    set_result(evaluation=None, top1=None)(run)
    (record,) = read_runs([run]).finished
    assert "top1" not in record.metrics
    assert record.per_class == ()


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(Refused, match="is not a run"):
        read_runs([tmp_path])
    with pytest.raises(Refused, match="does not exist"):
        read_runs([tmp_path / "none"])
