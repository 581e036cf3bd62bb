"""The page: everything in it, nothing in it that is not text, and no page about half a run."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from redistill_cache.errors import Refused

from redistill.demo.summary import accuracies
from redistill.optim import OptimConfig
from redistill.report import write_report
from redistill.report.charts import Line, lines, nice_ticks
from redistill.report.runs import group_runs, read_runs
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

    VOID = ("meta", "br", "img", "rect", "line", "circle", "polygon", "polyline")

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
        "Class by class",
        "What they minimised",
        "Some views",
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


def test_seeds_belong_together_and_names_tell_groups_apart(cohort: Path):
    groups = group_runs(read_runs([cohort / "runs"]))
    assert [(group.name, len(group.runs)) for group in groups] == [("ce", 2), ("power", 2)]


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


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "result.json").unlink(), "not finished"),
        (lambda run: (run / "metrics.csv").unlink(), "metrics.csv is missing"),
        (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), "without an epoch"),
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
    assert lines("t", [Line("a", [(1.0, [float("nan")])], 0)]) == ""
    assert "circle" in lines("t", [Line("a", [(1.0, [0.5])], 0)])
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert len(nice_ticks(3.0, 3.0)) >= 2
