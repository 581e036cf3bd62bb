"""The page itself: sections of HTML, every text from outside escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from redistill_cache import Archive, open_archive
from redistill_cache.files import LOCAL
from redistill_cache.inspect import describe
from redistill_cache.storage import disk_trouble

from redistill.report.charts import Line, bars, lines, reliability
from redistill.report.examples import Example, find_examples
from redistill.report.runs import Group, group_runs, read_runs, spread

__all__ = ["write_report"]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
# Classes shown from either end of the table of differences.
CLASSES = 8


def write_report(runs: Sequence[Path], out: Path, *, archive: Path | None = None, data: str | None = None) -> None:
    """Write the page about `runs` to `out`. With `archive` it shows its card, with `data` also views of it."""
    groups = group_runs(read_runs(runs))
    opened = None if archive is None else open_archive(archive)
    examples = find_examples(opened, data, groups) if opened is not None and data is not None else []
    names = None if opened is None else opened.class_names
    parts = [
        head(groups),
        accuracy_table(groups),
        curves(groups),
        calibration(groups),
        class_table(groups, names),
        terms(groups),
        views(examples, names),
        card(opened),
        run_list(groups),
    ]
    title = "Students" if opened is None else f"Students of {', '.join(opened.teachers)}"
    page = PAGE.format(
        title=escape(title),
        style=resources.files("redistill.report").joinpath("style.css").read_text(encoding="utf-8"),
        body="\n".join(part for part in parts if part),
    )
    with disk_trouble("write", out):
        LOCAL.publish(out, page.encode())


# -- numbers as text --------------------------------------------------------------------------------------------------


def share(values: Sequence[float]) -> str:
    found = spread(values)
    if found is None:
        return "–"
    mean, deviation = found
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if len(values) > 1 else "")


def plain(values: Sequence[float], digits: int = 3) -> str:
    found = spread(values)
    return "–" if found is None else f"{found[0]:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, text: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(text)}</p>{body}'


def cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


# -- sections ---------------------------------------------------------------------------------------------------------


def head(groups: Sequence[Group]) -> str:
    students = sorted({run.student for group in groups for run in group.runs})
    count = sum(len(group.runs) for group in groups)
    what = ", ".join(students)
    return (
        f'<p class="soft">{count} runs of {escape(what)}. Figures are means over seeds, ± one standard deviation.</p>'
    )


def accuracy_table(groups: Sequence[Group]) -> str:
    header = ("loss", "seeds", "top-1 %", "top-5 %", "NLL", "ECE", "agreement %", "KL to teacher", "images/s")
    rows = []
    for colour, group in enumerate(groups):
        beside = [run.evaluation or {} for run in group.runs]
        distance = [float(found["kl_t1"]) for found in beside if found.get("kl_t1") is not None]
        texts = [
            str(len(group.runs)),
            share(group.values("top1")),
            share(group.values("top5")),
            plain(group.values("nll")),
            plain(group.values("ece")),
            share(group.values("agreement")),
            plain(distance),
            plain(group.values("images_per_second"), 0),
        ]
        rows.append([cell(group.name, f"c{colour % 8}"), *map(cell, texts)])
    note = "" if any(group.values("top1") for group in groups) else "<p>No run was validated (--val).</p>"
    return f"<h2>How good they are</h2>{table(header, rows)}{note}"


def figure(title: str, drawing: str, caption: str = "") -> str:
    if not drawing:
        return ""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{drawing}{note}</figure>"


def curve_chart(title: str, groups: Sequence[Group], column: str, *, percent: bool = False, caption: str = "") -> str:
    found = [Line(group.name, group.curve(column), i) for i, group in enumerate(groups)]
    return figure(title, lines(title, found, percent=percent), caption)


def curves(groups: Sequence[Group]) -> str:
    charts = [
        curve_chart("Top-1 on unseen images", groups, "val_top1", percent=True, caption="by epoch; shaded: all seeds"),
        curve_chart(
            "Agreement with the teacher", groups, "val_agreement", percent=True, caption="same answer on unseen views"
        ),
        curve_chart("KL to the teacher", groups, "val_kl_t1", caption="at T = 1, on unseen views"),
        curve_chart("Negative log-likelihood", groups, "val_nll", caption="of the true class, on unseen images"),
    ]
    drawn = [chart for chart in charts if chart] or [curve_chart("Loss", groups, "train_loss")]
    return f'<h2>How they got there</h2><div class="grid2">{"".join(drawn)}</div>'


def calibration(groups: Sequence[Group]) -> str:
    charts = []
    for colour, group in enumerate(groups):
        bins = pooled_bins([run.evaluation for run in group.runs if run.evaluation is not None])
        if bins:
            found = f"ECE {plain(group.values('ece'))}"
            charts.append(figure(group.name, reliability(group.name, bins, colour), found))
    if not charts:
        return ""
    text = "Accuracy by confidence; on the diagonal, 0.8 is right 8 times in 10. Faint bars hold few images."
    return section("Do they know what they know?", text, f'<div class="small">{"".join(charts)}</div>')


def pooled_bins(evaluations: Sequence[dict[str, Any]]) -> list[tuple[float, float, int, float | None, float | None]]:
    """The bins of all seeds together."""
    if not evaluations:
        return []
    pooled = []
    for same in zip(*(found["reliability"] for found in evaluations), strict=True):
        rows = sum(item["rows"] for item in same)
        means = [
            sum(item["rows"] * item[key] for item in same if item[key] is not None) / rows if rows else None
            for key in ("confidence", "accuracy")
        ]
        pooled.append((same[0]["low"], same[0]["high"], rows, means[0], means[1]))
    return pooled


def class_table(groups: Sequence[Group], names: Sequence[str] | None) -> str:
    """Where the groups differ most from the first one."""
    accuracy = [per_class(group) for group in groups]
    if len(groups) < 2 or not all(accuracy):
        return ""
    last = len(groups) - 1
    pairs = [(accuracy[last][k] - accuracy[0][k], k) for k in sorted(accuracy[0]) if k in accuracy[last]]
    order = [k for _, k in sorted(pairs, reverse=True)]
    shown = order if len(order) <= 2 * CLASSES else order[:CLASSES] + order[-CLASSES:]
    rows = []
    for k in shown:
        name = str(k) if names is None else names[k]
        texts = [f"{100 * found[k]:.0f}" if k in found else "–" for found in accuracy]
        rows.append([cell(name), *map(cell, texts), cell(f"{100 * (accuracy[last][k] - accuracy[0][k]):+.0f}")])
    header = ["class", *(f"{group.name} %" for group in groups), f"{groups[last].name} − {groups[0].name}"]
    text = f"Sorted by the last column; {len(shown)} of {len(order)} classes."
    return section("Class by class", text, table(header, rows))


def per_class(group: Group) -> dict[int, float]:
    """Mean accuracy of every class over seeds."""
    found: dict[int, list[float]] = {}
    for run in group.runs:
        for k, value in enumerate((run.evaluation or {}).get("per_class", ())):
            if value is not None:
                found.setdefault(k, []).append(float(value))
    return {k: sum(values) / len(values) for k, values in found.items()}


def terms(groups: Sequence[Group]) -> str:
    """The parts of each loss while training."""
    charts = []
    for colour, group in enumerate(groups):
        columns = [name for name in group.columns("train_") if name != "train_loss"]
        found = [Line(name.removeprefix("train_"), group.curve(name), colour + i) for i, name in enumerate(columns)]
        charts.append(figure(group.name, lines(group.name, found)))
    text = "Parts of each loss on the training views, before weighting."
    return section("What they minimised", text, f'<div class="grid2">{"".join(charts)}</div>')


def views(examples: Sequence[Example], names: Sequence[str] | None) -> str:
    if not examples:
        return ""

    def named(k: int) -> str:
        return str(k) if names is None else names[k]

    parts = []
    for example in examples:
        said = []
        for who, k, confidence in example.answers:
            right = example.label in (k, -1)
            text = escape(named(k))
            shown = text if right else f'<span class="wrong">{text}</span>'
            said.append(f"{escape(who)}: {shown} {confidence:.0%}")
        truth = "no label" if example.label < 0 else f"<b>{escape(named(example.label))}</b>"
        alt = escape(example.key, quote=True)
        parts.append(f'<div><img src="{example.picture}" alt="{alt}">{truth}<br>{"<br>".join(said)}</div>')
    text = "View 0 of some images, as teacher and students saw it. Struck out: not the label."
    return section("Some views", text, f'<div class="views">{"".join(parts)}</div>')


def card(archive: Archive | None) -> str:
    """What an archive is, in short."""
    if archive is None:
        return ""
    found = describe(archive)
    recipe = ", ".join(str(op["op"]) for op in found["recipe"].get("ops", []))
    rows = [
        ("id", str(found["id"])),
        (
            "views",
            f"{found['num_views']:,} of each of {found['num_samples']:,} samples, {found['num_classes']:,} classes",
        ),
        ("recipe", recipe),
        ("size", f"{found['total_bytes'] / 2**20:.1f} MiB in all, {found['bytes_per_view']:.1f} bytes a view"),
        ("licence", found["licence"] or "not stated"),
        ("citation", found["citation"] or "not stated"),
    ]
    charts = []
    for teacher, signals in found["teachers"].items():
        for name, signal in signals.items():
            rows.append(
                (
                    f"{teacher}, {name}",
                    f"{signal['codec']}, {signal['bytes_per_view']:.1f} bytes a view{fidelity(signal)}",
                )
            )
            charts.append(fidelity_chart(archive, teacher, name))
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f'<h2>The archive</h2><div class="card"><dl>{body}</dl></div>{"".join(charts)}'


def fidelity(signal: dict[str, Any]) -> str:
    found = signal["fidelity"]
    if not found or found.get("mean_kl_t1") is None:
        return ""
    bound = "" if found.get("bound") is None else f" of {found['bound']:g} allowed"
    return f"; KL to the teacher on average {found['mean_kl_t1']:.2g}, at most {found['max_kl_t1']:.2g}{bound}"


def fidelity_chart(archive: Archive, teacher: str, signal: str) -> str:
    """How many rows lost how much, from the histogram that was kept while encoding."""
    stats: Any = archive.contents.stats.get(teacher, {}).get(signal)
    histogram = ((stats or {}).get("errors") or {}).get("kl_t1", {}).get("histogram", [])
    counts: dict[int, int] = {}
    for bin_, count in histogram:
        exponent = math.floor((bin_ / 8 - 60) * math.log10(2) * 4) if bin_ else -72
        counts[exponent] = counts.get(exponent, 0) + count
    if len(counts) < 2:
        return ""
    wide = range(max(min(counts), max(counts) - 30), max(counts) + 1)
    values = [(f"1e{k / 4:.1f}", float(counts.get(k, 0))) for k in wide]
    return figure(f"Loss of {teacher}'s {signal} by encoding", bars("fidelity", values), "rows by KL at T = 1")


def run_list(groups: Sequence[Group]) -> str:
    rows = [
        [
            cell(group.name, "text"),
            cell(str(run.seed)),
            cell(str(run.result.get("epochs"))),
            cell(str(run.folder), "text"),
        ]
        for group in groups
        for run in group.runs
    ]
    return f"<h2>The runs</h2>{table(('loss', 'seed', 'epochs', 'folder'), rows)}"
