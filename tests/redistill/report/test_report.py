"""The page: everything in it, nothing in it that is not text, and no page about half a run."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from redistill_cache.errors import Refused

from redistill.demo.run import accuracies
from redistill.optim import OptimConfig
from redistill.report import write_report
from redistill.report.charts import Curve, lines, nice_ticks
from redistill.report.runs import LineStyle, group_runs, read_runs
from redistill.training import TrainOptions, train
from tests.small_archive import DATA, VAL, cache


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two losses and two seeds, and the archive beside them."""
    folder = tmp_path_factory.mktemp("cohort")
    options = TrainOptions(
        data=DATA,
        archive=cache(folder / "a.redistill.zarr"),
        students=("demo:tiny",),
        out=folder / "runs",
        losses=("ce", "power"),
        seeds=(0, 1),
        optim=OptimConfig(epochs=2, lr=0.05),
        val=VAL,
        workers=0,
        log=("csv",),
    )
    found = accuracies(train(options))
    assert {name: accuracy.n for name, accuracy in found.items()} == {"ce": 2, "power": 2}
    return folder


class Page(HTMLParser):
    """What a browser would see: tags, and that they are closed."""

    VOID = ("meta", "br", "img", "rect", "line", "circle", "polygon", "polyline", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("src", "href") or value.startswith("data:image/png"), value

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(runs: list[Path], out: Path, **more) -> Page:
    write_report(runs, out, **more)
    page = Page(out.read_text())
    assert not page.open
    assert "script" not in page.tags
    return page


def test_everything_is_on_the_page(cohort: Path, tmp_path: Path):
    page = page_of([cohort / "runs"], tmp_path / "p.html", archive=cohort / "a.redistill.zarr", data=DATA)
    text = " ".join(page.words)
    for words in (
        "How good they are",
        "How they learned",
        "Do they know what they know?",
        "Class by class",
        "What they minimised",
        "What they say",
        "The archive",
        "The runs",
    ):
        assert words in text
    assert page.tags.count("img") == 12
    assert page.tags.count("svg") >= 6
    again = tmp_path / "again.html"
    write_report([cohort / "runs"], again, archive=cohort / "a.redistill.zarr", data=DATA)
    assert again.read_bytes() == (tmp_path / "p.html").read_bytes()


def test_text_from_outside_is_text(cohort: Path, tmp_path: Path):
    evil = '<script>alert("x")</script>'
    run = tmp_path / evil.replace("/", "_")
    shutil.copytree(cohort / "runs" / "power-0", run)
    result = json.loads((run / "result.json").read_text())
    result |= {"student": evil, "loss": "power?label=<img src=x onerror=1>"}
    (run / "result.json").write_text(json.dumps(result))
    metrics = (run / "metrics.csv").read_text().replace("train_power", 'train_"><b>')
    (run / "metrics.csv").write_text(metrics.replace('train_"><b>', '"train_""><b>"'))
    page = page_of([run, cohort / "runs"], tmp_path / "p.html")
    assert any(evil in word for word in page.words)
    assert "alert(" not in re.sub(r"&lt;script&gt;alert\(", "", (tmp_path / "p.html").read_text())


def copy_of(run: Path, to: Path, *changes: tuple[str, str]) -> Path:
    """A run under another name, some text of its config.toml replaced."""
    shutil.copytree(run, to)
    config = (to / "config.toml").read_text()
    for old, new in changes:
        assert old in config
        config = config.replace(old, new)
    (to / "config.toml").write_text(config)
    return to


def test_seeds_belong_together_and_other_settings_do_not(cohort: Path, tmp_path: Path):
    longer = copy_of(
        cohort / "runs" / "ce-0", tmp_path / "longer", ("epochs = 2", "epochs = 9"), ("lr = 0.05", "lr = 0.4")
    )
    groups, notes = group_runs(read_runs([cohort / "runs", longer]).runs)
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("ce · epochs 2 · lr 0.05", 2),
        ("power · epochs 2 · lr 0.05", 2),
        ("ce · epochs 9 · lr 0.4", 1),
    ]
    assert not notes
    ce, power, other = (group.look for group in groups)
    assert ce.colour == other.colour != power.colour
    assert ce.dash == power.dash != other.dash


def test_a_run_given_twice_is_counted_once(cohort: Path, tmp_path: Path):
    """Also as a copy, wherever it says it ran."""
    runs = cohort / "runs"
    assert len(read_runs([runs, runs / "ce-0", runs / ".." / "runs"]).runs) == 4
    again = copy_of(runs / "ce-0", tmp_path / "again", ('device = "auto"', 'device = "cuda:1"'))
    written = write_report([runs, again], tmp_path / "p.html")
    assert (written.runs, written.groups) == (4, 2)
    assert [note.partition(" is the same run as ")[0] for note in written.notes] == [str(again)]


def test_members_that_are_not_finished_are_named(cohort: Path, tmp_path: Path):
    """Also one whose files were cut: it says nothing that could be shown."""
    runs = tmp_path / "runs"
    shutil.copytree(cohort / "runs", runs)
    for name in ("ce-1", "power-1"):
        (runs / name / "result.json").unlink()
    metrics = runs / "power-1" / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-9])
    page = page_of([runs], tmp_path / "p.html")
    assert f"{runs / 'ce-1'} is not finished (2 of 2 epochs)" in page.words
    assert f"{runs / 'power-1'} is not finished, and its files cannot be read" in page.words


def test_a_run_without_validation_has_its_loss(cohort: Path, tmp_path: Path):
    options = TrainOptions(
        data=DATA,
        archive=cohort / "a.redistill.zarr",
        students=("demo:tiny",),
        out=tmp_path / "bare",
        optim=OptimConfig(epochs=1),
        workers=0,
        log=("csv",),
    )
    train(options)
    text = " ".join(page_of([tmp_path / "bare"], tmp_path / "p.html").words)
    assert "No run was validated" in text
    (tmp_path / "bare" / "metrics.csv").unlink()
    assert (
        f"no metrics.csv, so no curves: {tmp_path / 'bare'}" in page_of([tmp_path / "bare"], tmp_path / "p.html").words
    )


def cut(file: Path, characters: int, end: str = "") -> None:
    file.write_text(file.read_text()[:-characters] + end)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "result.json").unlink(), "not finished"),
        (lambda run: cut(run / "metrics.csv", 3), "in the middle of a line"),
        (lambda run: cut(run / "metrics.csv", 30, "\n"), "line 3, is longer or shorter"),
        (lambda run: (run / "metrics.csv").write_text("epoch,val_top1\n1,1e300\n"), "line 2: val_top1 is 1e.300"),
        (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), "line 2, has no epoch"),
        (lambda run: (run / "config.toml").write_text("options = 3"), "readable run"),
        (lambda run: (run / "result.json").write_text("{"), "readable run"),
        (lambda run: (run / "result.json").write_text("{}"), "readable run"),
    ],
)
def test_half_a_run_is_refused_by_name(cohort: Path, tmp_path: Path, damage, words: str):
    run = tmp_path / "run"
    shutil.copytree(cohort / "runs" / "ce-0", run)
    (run / "last.ckpt").write_bytes(b"")
    damage(run)
    with pytest.raises(Refused, match=words) as error:
        write_report([run], tmp_path / "p.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "p.html").exists()


def test_charts_of_nothing_and_of_one_point():
    assert lines("t", []) == ""
    assert "circle" in lines("t", [Curve("a", [(1.0, [0.5])], LineStyle())])
    assert "polyline" in lines("t", [Curve("a", [(1.0, [0.0]), (2.0, [5e-324])], LineStyle())])
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(nice_ticks(3.0, 3.0)) >= 2
