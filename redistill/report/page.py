"""The page: its sections in order, and what must be known before they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from redistill_cache import Archive, open_archive
from redistill_cache.errors import UsageError
from redistill_cache.storage import LOCAL, disk_trouble

from redistill.report import results
from redistill.report.card import archive_card
from redistill.report.examples import Examples, find_examples, views
from redistill.report.markup import section, table, text
from redistill.report.runs import Found, Group, group_runs, read_runs

__all__ = ["WrittenReport", "write_report"]

# Nothing is fetched and nothing runs, whatever a name in the page may say.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style></head><body>
<header><h1>{title}</h1>
<p class="lead">{lead}</p>{notes}</header>
{body}
<footer>redistill {version}</footer>
</body></html>
"""


@dataclass(frozen=True)
class WrittenReport:
    """What a page tells of."""

    runs: int
    groups: int
    notes: tuple[str, ...]
    """What it does not tell, and why: runs that are not finished, runs given twice, another archive."""


def write_report(
    runs: Sequence[Path], out: Path, *, archive: Path | None = None, data: str | None = None
) -> WrittenReport:
    """Write the page about `runs` to `out`. With `archive` it shows its card, with `data` also views of it."""
    if data is not None and archive is None:
        raise UsageError("--data shows views of an archive; add --archive")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name the file to write, such as {out / 'report.html'}")
    found = read_runs(runs)
    groups, twice = group_runs(found.runs)
    opened = None if archive is None else open_archive(archive)
    examples = find_examples(opened, data, groups) if opened is not None and data is not None else None
    notes = [*map(str, found.unfinished), *twice, *doubts(groups, opened)]
    page = compose(found, groups, opened, examples, notes)
    with disk_trouble("write", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        LOCAL.publish(out, page.encode())
    return WrittenReport(sum(len(group.runs) for group in groups), len(groups), tuple(notes))


def doubts(groups: Sequence[Group], archive: Archive | None) -> list[str]:
    """What makes figures of this page hard to compare."""
    runs = [run for group in groups for run in group.runs]
    notes = []
    if archive is not None and all(run.archive_id != archive.id for run in runs):
        notes.append(f"none of these students was taught from {archive.path}: its id is not that of their archive")
    validated = {str(run.options.get("val")) for run in runs}
    if len(validated) > 1:
        notes.append(f"students were validated on different images: {', '.join(sorted(validated))}")
    bare = [str(run.folder) for run in runs if not run.history]
    if bare:
        notes.append(f"no metrics.csv, so no curves: {', '.join(bare)}")
    return notes


def compose(
    found: Found, groups: Sequence[Group], archive: Archive | None, examples: Examples | None, notes: Sequence[str]
) -> str:
    names = class_names(groups, archive)
    body = [
        results.accuracy(groups),
        results.learning(groups),
        results.beside_teacher(groups),
        results.calibration(groups),
        results.classes(groups, names),
        results.terms(groups),
        views(examples, None if archive is None else archive.class_names),
        archive_card(archive, groups),
        run_list(found, groups),
    ]
    title = "Students" if archive is None else f"Students of {', '.join(archive.teachers)}"
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return PAGE.format(
        title=text(title),
        style=resources.files("redistill.report").joinpath("style.css").read_text(encoding="utf-8"),
        lead=text(summary(groups)),
        notes=f'<ul class="notes">{items}</ul>' if items else "",
        body="\n".join(body),
        version=text(metadata.version("redistill")),
    )


def summary(groups: Sequence[Group]) -> str:
    """One sentence: how many runs, of what, for how long."""
    runs = [run for group in groups for run in group.runs]
    students = {f"{run.student} ({run.parameters:,} parameters)": None for run in runs}
    epochs = sorted({run.epochs for run in runs})
    long = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    held = sorted({int(run.figures["rows"]) for run in runs if "rows" in run.figures})
    tested = f", tested on {held[0]:,} held-out images" if len(held) == 1 else ""
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs in {len(groups)} groups"
    return f"{count}: {', '.join(students)}, trained for {long} epochs{tested}."


def class_names(groups: Sequence[Group], archive: Archive | None) -> Sequence[str] | None:
    """Names for the classes of the runs: an archive's, where some were taught from it and it has as many."""
    if archive is None or archive.class_names is None:
        return None
    runs = [run for group in groups for run in group.runs]
    ours = any(run.archive_id == archive.id for run in runs)
    fits = all(len(run.per_class) in (0, archive.num_classes) for run in runs)
    return archive.class_names if ours and fits else None


def run_list(found: Found, groups: Sequence[Group]) -> str:
    """Where everything lies."""
    rows = [
        [
            text(group.name),
            str(run.seed),
            str(run.epochs),
            text((run.archive_id or "")[:12]),
            text(run.loss),
            text(run.folder),
        ]
        for group in groups
        for run in group.runs
    ]
    rows += [
        [text("not finished"), "", text("" if item.epochs is None else item.epochs), "", "", text(item.folder)]
        for item in found.unfinished
    ]
    return section("The runs", table(("group", "seed", "epochs", "archive", "loss", "folder"), rows, "runs"))
