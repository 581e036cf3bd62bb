"""The sections about runs: how good students are, how they got there, how near to the teacher, class by class."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from redistill.report.charts import MOST_NAMED, Curve, class_dots, lines, reliability, seeds
from redistill.report.markup import DOT, LINE, figure, missing, name_list, named, section, share, table, value
from redistill.report.runs import Group, LineStyle, pooled_bins

__all__ = ["accuracy", "beside_teacher", "calibration", "classes", "learning", "terms"]

# Classes shown from either end of a long list.
CLASSES = 14


def accuracy(groups: Sequence[Group]) -> str:
    top1 = [found for group in groups for found in group.values("top1")]
    columns = ("loss", "seeds", "top-1 %", "each seed", "top-5 %", "NLL", "ECE", "images/s")
    rows = [
        [
            named(group, LINE),
            str(len(group.runs)),
            share(group.values("top1")),
            seeds(group.values("top1"), min(top1, default=0), max(top1, default=1), group.look),
            share(group.values("top5")),
            value(group.values("nll")),
            value(group.values("ece")),
            value(group.values("images_per_second"), 0),
        ]
        for group in groups
    ]
    lead = "On held-out images at the end of training: mean ± standard deviation over seeds."
    note = "" if top1 else missing("No run was validated; give --val to redistill train.")
    return section("How good they are", table(columns, rows, "figures") + note, lead)


def learning(groups: Sequence[Group]) -> str:
    charts = [
        curve_chart("Top-1", groups, "val_top1", percent=True, caption="on held-out images"),
        curve_chart("Negative log-likelihood", groups, "val_nll", caption="of the true class, on held-out images"),
        curve_chart("Training loss", groups, "train_loss", caption="each loss has a scale of its own"),
    ]
    body = grid(charts) or missing("No run kept figures of its epochs; give --log csv to redistill train.")
    if len(groups) > MOST_NAMED:
        body = name_list(groups, LINE) + body
    return section("How they learned", body, "Lines are means, bands reach from the lowest to the highest seed.")


def beside_teacher(groups: Sequence[Group]) -> str:
    title = "How near to the teacher"
    if not any(group.values("agreement") for group in groups):
        return section(title, missing("Not measured; give --val-archive to redistill train."))
    of_teacher = [found for group in groups for found in group.values("teacher_top1")]
    warm = sorted({found for group in groups for found in group.values("temperature")})
    at = f"{warm[0]:g}" if len(warm) == 1 else "high"
    columns = ("loss", "agreement %", "KL, T = 1", f"KL, T = {at}", "if right %", "if wrong %", "copied %")
    rows = [
        [
            named(group, LINE),
            share(group.values("agreement")),
            value(group.values("kl_t1")),
            value(group.values("kl")),
            share(group.values("top1_where_teacher_right")),
            share(group.values("top1_where_teacher_wrong")),
            share(group.values("copied")),
        ]
        for group in groups
    ]
    charts = [
        curve_chart("Agreement", groups, "val_agreement", percent=True, caption="same answer as the teacher"),
        curve_chart("KL(teacher ‖ student)", groups, "val_kl_t1", caption="at T = 1"),
    ]
    lead = "Then: top-1 if it is right, top-1 if it is wrong, and the share of its errors that were copied."
    if of_teacher:
        lead = f"The teacher is right on {100 * statistics.fmean(of_teacher):.1f} % of the held-out views. {lead}"
    return section(title, table(columns, rows, "figures") + grid(charts), lead)


def calibration(groups: Sequence[Group]) -> str:
    title, charts = "Do they know what they know?", []
    for group in groups:
        bins = pooled_bins(group.runs)
        if bins:
            ece = statistics.fmean(group.values("ece") or [0.0])
            charts.append(figure(group.name, reliability(group.name, bins, group.look), f"ECE {ece:.3f}", "small"))
    if not charts:
        return section(title, missing("No run was validated, so nothing is known of their confidence."))
    lead = (
        "Accuracy by confidence, all seeds together: on the diagonal, 0.8 is right 8 times in 10. Grey: images by bin."
    )
    return section(title, f'<div class="smalls">{"".join(charts)}</div>', lead)


def classes(groups: Sequence[Group], names: Sequence[str] | None) -> str:
    """Accuracy of every class, in the order of what the best group gains over the first one."""
    title = "Class by class"
    known = [group for group in groups if group.per_class()]
    if not known:
        return section(title, missing("No run was validated, so nothing is known of single classes."))
    base, best = 0, best_beside(known)
    low, high = known[base].per_class(), known[best].per_class()
    gain = {k: high[k] - (low[k] if best != base else 0.0) for k in high if k in low}
    order = sorted(gain, key=lambda k: (-gain[k], k))
    parts = [order] if len(order) <= 2 * CLASSES else [order[:CLASSES], order[-CLASSES:]]
    if len(parts) == 1 and len(order) > CLASSES:
        parts = [order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]]
    drawn = []
    for some in parts:
        shown = [str(k) if names is None else names[k] for k in some]
        drawn.append(figure("", class_dots(shown, known, some, (base, best)), "", "plain"))
    sorted_by = f"Sorted by what {known[best].short} gains over {known[base].short}, in points. "
    left_out = f"{2 * CLASSES} of {len(order)} classes, from both ends. " if len(order) > 2 * CLASSES else ""
    unnamed = "Names of classes need --archive. " if names is None else ""
    lead = f"Mean accuracy over seeds. {sorted_by if best != base else ''}{left_out}{unnamed}"
    return section(title, name_list(known, DOT) + f'<div class="grid">{"".join(drawn)}</div>', lead.strip())


def best_beside(groups: Sequence[Group]) -> int:
    """The group of the highest mean top-1 that is not the first, or the first where it is alone."""
    means = [statistics.fmean(group.values("top1") or [0.0]) for group in groups]
    return max(range(1, len(groups)), key=lambda at: means[at], default=0)


def terms(groups: Sequence[Group]) -> str:
    """The parts of each loss while training."""
    charts = []
    for group in groups:
        columns = [name for name in group.columns("train_") if name != "train_loss"]
        curves = [
            Curve(name.removeprefix("train_"), group.curve(name), LineStyle(group.look.colour, at))
            for at, name in enumerate(columns)
        ]
        charts.append(figure(group.name, lines(group.name, curves)))
    lead = "The parts of each loss on the training views, before they are weighted."
    body = grid(charts) or missing("No run kept figures of its epochs.")
    return section("What they minimised", body, lead)


def curve_chart(title: str, groups: Sequence[Group], column: str, *, percent: bool = False, caption: str = "") -> str:
    curves = [Curve(group.short, group.curve(column), group.look) for group in groups]
    return figure(title, lines(title, curves, percent=percent), caption)


def grid(charts: Sequence[str]) -> str:
    drawn = "".join(charts)
    return f'<div class="grid">{drawn}</div>' if drawn else ""
