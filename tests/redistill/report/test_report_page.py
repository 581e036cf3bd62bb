"""The page: it has every section, is self-contained, and escapes untrusted text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from redistill_cache.errors import RedistillError
from redistill_cache.writer import ArchiveWriter

from redistill.optim import OptimConfig
from redistill.report import write_report
from redistill.report.examples import Example, Examples, Prediction
from redistill.report.page import render
from redistill.report.runs import group_runs, read_runs
from redistill.training import TrainOptions, train
from tests import tiny_archive
from tests.small_archive import DATA, without_canaries

SECTIONS = (
    "Accuracy",
    "Training curves",
    "Agreement with the teacher",
    "Calibration",
    "Accuracy by class",
    "Loss terms",
    "Example predictions",
    "Archive",
    "Runs",
)


def hostile(field: str) -> str:
    """Markup, an event handler, quotes, an escape sequence and a reversal of the text direction."""
    return f"<script>{field}<img src=x onerror=1>\"'\x1b[31m\u202e"


def shown(field: str) -> str:
    """The same as text on the page, without control characters."""
    return f"<script>{field}<img src=x onerror=1>\"'\\x1b[31m\\x202e"


class Page(HTMLParser):
    """The tags and texts of a page. Tags must be closed; nothing may run or be fetched."""

    VOID = ("meta", "br", "img", "rect", "line", "circle", "polygon", "polyline", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        assert not self.open
        assert "script" not in self.tags
        assert html.isascii() or all(c.isprintable() or c == "\n" for c in html)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

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
        self.texts.append(data)


def make_page(runs: list[Path], out: Path, **options) -> Page:
    write_report(runs, out, **options)
    return Page(out.read_text())


def test_every_section_is_on_the_page(cohort: Path, archive: Path, tmp_path: Path):
    page = make_page([cohort], tmp_path / "p.html", archive=archive, data=DATA)
    headings = [text for text in page.texts if text in SECTIONS]
    assert headings == list(SECTIONS)
    assert page.tags.count("img") == 12
    assert page.tags.count("svg") >= 6


def test_the_same_runs_make_the_same_page(cohort: Path, archive: Path, tmp_path: Path):
    for name in ("a.html", "b.html"):
        write_report([cohort], tmp_path / name, archive=archive, data=DATA)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def hostile_run(run: Path, folder: Path, archive_id: str) -> Path:
    """A copy of a run with hostile text in its folder name and in every text of its files."""
    to = folder / hostile("folder")
    shutil.copytree(run, to)
    result = json.loads((to / "result.json").read_text())
    result |= {"student": hostile("student"), "loss": f"power?label={hostile('loss')}", "archive_id": archive_id}
    result["evaluation"]["per_class"] = [0.5] * tiny_archive.CLASSES
    (to / "result.json").write_text(json.dumps(result))
    options = {"val": hostile("val"), "archive": hostile("archive"), hostile("option"): hostile("value")}
    lines = [
        f"{json.dumps(name)} = {json.dumps(value)}\n" for name, value in options.items()
    ]  # JSON's strings are TOML
    (to / "config.toml").write_text("[options]\n" + "".join(lines))
    metrics = (to / "metrics.csv").read_text()
    assert "train_power" in metrics
    column = hostile("column").replace('"', '""')
    (to / "metrics.csv").write_text(metrics.replace("train_power", f'"train_{column}"'))
    return to


def hostile_archive(path: Path) -> str:
    """An archive with hostile text wherever a writer is free to choose; its id."""
    spec = replace(
        tiny_archive.SPEC,
        class_names=tuple(hostile(f"class {k}") for k in range(tiny_archive.CLASSES)),
        recipe={"ops": [{"op": hostile("op"), hostile("setting"): hostile("strength")}], "size": hostile("size")},
        source={hostile("source"): hostile("data")},
        licence=hostile("licence"),
        citation=hostile("citation"),
    )
    writer = ArchiveWriter.create(path, spec)
    writer.write_samples(**tiny_archive.samples(spec))
    model = {"spec": hostile("teacher"), "weights_digest": hostile("digest")}
    writer.add_teacher(replace(tiny_archive.TEACHER, model=model))
    tiny_archive.fill(writer)
    return writer.seal()


def test_text_of_runs_and_archives_is_escaped(cohort: Path, tmp_path: Path):
    run = hostile_run(cohort / "power-0", tmp_path, hostile_archive(tmp_path / "a.redistill.zarr"))
    alone = make_page([run], tmp_path / "alone.html", archive=tmp_path / "a.redistill.zarr")
    for field in ("folder", "student", "loss", "column", "class 5"):
        assert shown(field) in alone.text, field
    for field in ("op", "setting", "strength", "size", "source", "data", "licence", "citation", "teacher"):
        assert shown(field) in alone.text, field
    assert "<script>dig" in alone.text
    beside = make_page([run, cohort], tmp_path / "beside.html")
    for field in ("folder", "student", "loss", "column", "val", "archive", "option", "value"):
        assert shown(field) in beside.text, field
    for name in ("alone", "beside"):
        html = (tmp_path / f"{name}.html").read_text()
        assert "<script" not in html
        assert "<img" not in html


def test_text_of_examples_and_notes_is_escaped(cohort: Path):
    run_list = read_runs([cohort])
    groups, _ = group_runs(run_list.finished)
    prediction = Prediction(hostile("model"), "teacher", hostile("label"), 0.5, correct=True)
    example = Example("data:image/png;base64,", hostile("key"), hostile("truth"), (prediction,))
    examples = Examples((example,), (example,), (hostile("example note"),))
    html = render(run_list, groups, None, examples, [hostile("note")])
    page = Page(html)
    for field in ("model", "label", "truth", "example note", "note"):
        assert shown(field) in page.text, field
    assert "&lt;script&gt;key" in html
    assert "<script" not in html
    assert page.tags.count("img") == 2


def test_a_teacher_cannot_have_markup_as_its_name():
    with pytest.raises(RedistillError, match="name of a teacher"):
        replace(tiny_archive.TEACHER, name=hostile("name"))


def test_unfinished_runs_are_named(cohort: Path, tmp_path: Path):
    """Also one whose files are cut off and show no progress."""
    runs = tmp_path / "runs"
    shutil.copytree(cohort, runs)
    for name in ("ce-1", "power-1"):
        (runs / name / "result.json").unlink()
    metrics = runs / "power-1" / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-9])
    page = make_page([runs], tmp_path / "p.html")
    assert f"{runs / 'ce-1'} is not finished (2 of 2 epochs)" in page.texts
    assert f"{runs / 'power-1'} is not finished, and its files cannot be read" in page.texts


def test_a_run_without_validation_or_metrics_still_has_a_page(archive: Path, tmp_path: Path):
    options = TrainOptions(
        data=DATA,
        archive=archive,
        students=("demo:tiny",),
        out=tmp_path / "bare",
        optim=OptimConfig(epochs=1),
        workers=0,
        log=("csv",),
    )
    train(options)
    assert "No run was validated" in make_page([tmp_path / "bare"], tmp_path / "p.html").text
    (tmp_path / "bare" / "metrics.csv").unlink()
    page = make_page([tmp_path / "bare"], tmp_path / "p.html")
    assert f"no metrics.csv, so no curves: {tmp_path / 'bare'}" in page.texts
    assert "No run has metrics.csv" in page.text


def test_a_run_on_an_archive_without_canaries_says_so(archive: Path, cohort: Path, tmp_path: Path):
    bare = without_canaries(archive, tmp_path / "bare.redistill.zarr")
    run = tmp_path / "run"
    optim = OptimConfig(epochs=1, lr=0.05)
    train(TrainOptions(data=DATA, archive=bare, students=("demo:tiny",), out=run, workers=0, optim=optim))
    assert json.loads((run / "result.json").read_text())["alignment"] == "no canaries"
    assert json.loads((cohort / "ce-0" / "result.json").read_text())["alignment"] == "exact"
    page = make_page([run], tmp_path / "p.html", archive=bare)
    assert f"the archive has no canaries, so its views were not compared: {run}" in page.texts
    assert "no canaries per view" in page.text
