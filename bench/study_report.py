"""Tables and plots of bench/study.py, from the results of its cells."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from methods import holm
from scipy.stats import ttest_rel

__all__ = ["BASE", "at_same_temperature", "best_of_two", "compared", "draw", "gradients", "summary"]

BASE = "kl?temperature=4"
SETTING = ("task", "teacher", "student", "optimiser", "per_class", "views", "fidelity", "length")
CENTRE = {"student": "small", "optimiser": "sgd", "per_class": 0, "views": 8, "fidelity": "1e-3", "length": 1.0}
ALPHA = 0.05

Row = dict[str, Any]


def compared(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for every loss of every setting, compared with KL at T = 4 of the same setting over the seeds of both."""
    top1: dict[tuple[Any, ...], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    cells: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    about: dict[tuple[Any, ...], Row] = {}
    for result in results:
        if "students" not in result:
            continue
        setting = tuple(result["setting"][name] for name in SETTING)
        for student in result["students"]:
            top1[setting][student["loss"]][student["seed"]] = student["top1"]
            key = (*setting, student["loss"])
            if result["cell"] not in cells[key]:
                cells[key].append(result["cell"])
            about[key] = {name: result[name] for name in ("axis", "images", "epochs")}
    rows = []
    for setting, of_losses in top1.items():
        base = of_losses.get(BASE, {})
        tests = {loss: paired_p(of_seed, base) for loss, of_seed in of_losses.items()}
        tested = [loss for loss, p in tests.items() if p is not None]
        corrected = dict(zip(tested, holm([tests[loss] or 0.0 for loss in tested]), strict=True))
        for loss, of_seed in of_losses.items():
            shared = sorted(of_seed.keys() & base.keys())
            values = [of_seed[seed] for seed in sorted(of_seed)]
            rows.append(
                {
                    **dict(zip(SETTING, setting, strict=True)),
                    "loss": loss,
                    **about[*setting, loss],
                    "top1": statistics.mean(values),
                    "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
                    "seeds": len(values),
                    "difference": statistics.mean(of_seed[s] - base[s] for s in shared) if shared else None,
                    "p": tests[loss],
                    "p_holm": corrected.get(loss),
                    "top1_of_seed": {seed: of_seed[seed] for seed in sorted(of_seed)},
                    "cells": cells[*setting, loss],
                }
            )
    return rows


def gradients(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of the cells that measure gradients."""
    of_cells = [(result["setting"], row) for result in results for row in result.get("gradients", ())]
    return [
        {"table": "gradients", "task": setting["task"], "teacher": setting["teacher"], **row}
        for setting, row in of_cells
    ]


def paired_p(of_seed: Mapping[int, float], base: Mapping[int, float]) -> float | None:
    """Of a paired t-test over the seeds of both; None where the differences do not vary, so that there is no test."""
    shared = sorted(of_seed.keys() & base.keys())
    own, others = [of_seed[seed] for seed in shared], [base[seed] for seed in shared]
    differences = [a - b for a, b in zip(own, others, strict=True)]
    if len(shared) < 2 or max(differences) - min(differences) < 1e-9:
        return None
    return float(ttest_rel(own, others).pvalue)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Losses over all tasks: a line for every loss and teacher at the centre of the study.

    The p-value is of a paired t-test over the seeds of all tasks. `worse` and `better` count tasks where a loss differs
    from KL at T = 4 after Holm.
    """
    lines = []
    centre = [row for row in rows if is_central(row)]
    for teacher, loss in dict.fromkeys((row["teacher"], row["loss"]) for row in centre):
        of_tasks = [row for row in centre if (row["teacher"], row["loss"]) == (teacher, loss)]
        of_tasks = [row for row in of_tasks if row["difference"] is not None]
        base = {row["task"]: row for row in centre if (row["teacher"], row["loss"]) == (teacher, BASE)}
        pairs = [
            (top1, base[row["task"]]["top1_of_seed"][seed])
            for row in of_tasks
            for seed, top1 in row["top1_of_seed"].items()
            if seed in base[row["task"]]["top1_of_seed"]
        ]
        if not of_tasks:
            continue
        own, others = dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs))
        significant = [row for row in of_tasks if (row["p_holm"] or 1.0) < ALPHA]
        lines.append(
            {
                "table": "summary",
                "teacher": teacher,
                "loss": loss,
                "tasks": len(of_tasks),
                "difference": statistics.mean(row["difference"] for row in of_tasks),
                "least": min(row["difference"] for row in of_tasks),
                "most": max(row["difference"] for row in of_tasks),
                "better": sum(row["difference"] > 0 for row in significant),
                "worse": sum(row["difference"] < 0 for row in significant),
                "p": paired_p(own, others),
            }
        )
    return sorted(lines, key=lambda line: (line["teacher"], -line["difference"]))


def best_of_two(rows: Sequence[Row], first: str = "power", second: str = "kl") -> list[Row]:
    """Two losses, each with the one temperature that is best for it over all tasks, with a sound and a misled teacher.

    A line for every task and teacher, with the p-value of a paired t-test over the seeds.
    """
    of: dict[str, dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in rows:
        if row["teacher"] in ("sound", "misled-20") and is_central(row):
            of[row["loss"]][row["task"], row["teacher"]] = row
    candidates = {
        name: [loss for loss in of if re.fullmatch(rf"{name}\?temperature=\d+", loss)] for name in (first, second)
    }
    known = [set(of[loss]) for losses in candidates.values() for loss in losses]
    places = sorted(set.intersection(*known)) if known else []
    if not places or not all(candidates.values()):
        return []
    chosen = [
        max(losses, key=lambda loss: statistics.mean(of[loss][place]["top1"] for place in places))
        for losses in candidates.values()
    ]
    one, other = (of[loss] for loss in chosen)
    return corrected_for_many([duel("best of two", one[place], other[place]) for place in places])


def at_same_temperature(rows: Sequence[Row], first: str = "power", second: str = "kl") -> list[Row]:
    """Two losses at each temperature at the centre of the study: a line for every task, teacher and temperature."""
    of = {(row["task"], row["teacher"], row["loss"]): row for row in rows if is_central(row)}
    lines = []
    for task, teacher, loss in sorted(of):
        other = of.get((task, teacher, loss.replace(f"{first}?", f"{second}?")))
        if re.fullmatch(rf"{first}\?temperature=\d+", loss) and other is not None:
            lines.append(duel("same temperature", of[task, teacher, loss], other))
    return corrected_for_many(lines)


def duel(table: str, one: Row, other: Row) -> Row:
    """Two losses of one setting, with the p-value of a paired t-test over the seeds."""
    return {
        "table": table,
        "task": one["task"],
        "teacher": one["teacher"],
        "losses": [one["loss"], other["loss"]],
        "top1": [one["top1"], other["top1"]],
        "difference": one["top1"] - other["top1"],
        "p": paired_p(one["top1_of_seed"], other["top1_of_seed"]),
    }


def corrected_for_many(lines: Sequence[Row]) -> list[Row]:
    corrected = iter(holm([line["p"] for line in lines if line["p"] is not None]))
    return [line | {"p_holm": None if line["p"] is None else next(corrected)} for line in lines]


def is_central(row: Row) -> bool:
    return all(row[name] == value for name, value in CENTRE.items())


# -- plots ------------------------------------------------------------------------------------------------------------

SHOWN = {
    "kl?temperature=4": ("KL, T = 4", "tab:blue", "-"),
    "kl?temperature=1": ("KL, T = 1", "tab:blue", "--"),
    "power?temperature=4": ("power, T = 4", "tab:red", "-"),
    "power?temperature=1": ("power, T = 1", "tab:red", "--"),
}
LITERAL = {
    "power?form=cressie-read&temperature=4": ("power literal, T = 4", "tab:gray", "-"),
    "power?form=cressie-read&temperature=1": ("power literal, T = 1", "tab:gray", "--"),
}
LABELS = "ce"
Points = Sequence[tuple[Any, float, float]]


def draw(rows: Sequence[Row], audited: Sequence[Row], folder: Path) -> None:
    """The plots whose cells are done, the same bytes from the same results."""
    # Text as text and fixed ids, so that a second run writes the same bytes.
    style = {"svg.fonttype": "none", "svg.hashsalt": "redistill", "font.size": 8}
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(style):
        for plot in (draw_noise, draw_temperature, draw_views):
            plot(rows, folder)
        if audited:
            draw_audit(audited, folder)


def at_centre(rows: Sequence[Row], **others: Any) -> list[Row]:  # noqa: ANN401  values of a setting
    wanted = {**CENTRE, "teacher": "sound", **others}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def draw_noise(rows: Sequence[Row], folder: Path) -> None:
    def points(task: str, loss: str) -> Points:
        shares = {0: "sound", 10: "misled-10", 20: "misled-20", 40: "misled-40"}
        return [
            (share, row["top1"], row["sd"])
            for share, teacher in shares.items()
            for row in at_centre(rows, task=task, teacher=teacher)
            if row["loss"] == loss
        ]

    panels(rows, points, "confidently wrong rows of the teacher, %", folder / "study_noise.svg", [0, 10, 20, 40])


def draw_temperature(rows: Sequence[Row], folder: Path) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    teachers = {"sound": "-", "misled-20": ":"}
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 2.8), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for teacher, line in teachers.items():
            for name, colour in (("kl", "tab:blue"), ("power", "tab:red")):
                found = {row["loss"]: row for row in at_centre(rows, task=task, teacher=teacher)}
                at = [t for t in (1, 2, 4, 8) if f"{name}?temperature={t}" in found]
                of = [found[f"{name}?temperature={t}"] for t in at]
                label = f"{'KL' if name == 'kl' else name}, {teacher}"
                errors(axis, [(t, row["top1"], row["sd"]) for t, row in zip(at, of, strict=True)], label, colour, line)
        labels_line(axis, rows, task)
        axis.set(xscale="log", title=task, xlabel="temperature")
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"], minor=False)
        axis.minorticks_off()
    finish(figure, axes[0], folder / "study_temperature.svg")


def draw_views(rows: Sequence[Row], folder: Path) -> None:
    def points(task: str, loss: str) -> Points:
        ticks = {1: 1, 2: 2, 4: 4, 8: 8, 16: 16, 0: 32}
        return [
            (at, row["top1"], row["sd"])
            for views, at in ticks.items()
            for row in at_centre(rows, task=task, views=views)
            if row["loss"] == loss
        ]

    has_views = [row for row in rows if any(row["task"] == r["task"] and r["views"] == 1 for r in rows)]
    if has_views:
        panels(has_views, points, "cached views", folder / "study_views.svg", [1, 2, 4, 8, 16, 32], log=True)


def panels(rows: Sequence[Row], points: Any, xlabel: str, path: Path, ticks: list[int], log: bool = False) -> None:  # noqa: ANN401
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 2.8), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for loss, (label, colour, line) in SHOWN.items():
            if len(found := points(task, loss)) > 1:
                errors(axis, found, label, colour, line)
        labels_line(axis, rows, task)
        axis.set(title=task, xlabel=xlabel, **({"xscale": "log"} if log else {}))
        names = ["online" if log and tick == 32 else str(tick) for tick in ticks]
        axis.set_xticks(ticks, names)
        axis.minorticks_off()
    finish(figure, axes[0], path)


def errors(axis: Any, points: Points, label: str, colour: str, line: str) -> None:  # noqa: ANN401
    if points:
        x, mean, sd = zip(*points, strict=True)
        percent = [100 * value for value in mean], [100 * value for value in sd]
        axis.errorbar(x, *percent, label=label, color=colour, linestyle=line, marker=".", capsize=2, linewidth=1)


def labels_line(axis: Any, rows: Sequence[Row], task: str) -> None:  # noqa: ANN401
    for row in at_centre(rows, task=task):
        if row["loss"] == LABELS:
            axis.axhline(100 * row["top1"], color="black", linewidth=0.8, linestyle="-.", label="labels only")


def draw_audit(audited: Sequence[Row], folder: Path) -> None:
    kinds = list(dict.fromkeys((row["task"], row["teacher"]) for row in audited))
    figures = {
        "norm": "mean length of the gradient",
        "shrunk": "rows below a tenth of KL's",
        "cosine": "cosine to KL's",
    }
    figure, axes = plt.subplots(len(figures), len(kinds), figsize=(2.6 * len(kinds), 6), squeeze=False, sharex="col")
    for column, (task, teacher) in enumerate(kinds):
        for of_column, (name, text) in zip(axes, figures.items(), strict=True):
            axis = of_column[column]
            for loss, (label, colour, line) in {**SHOWN, **LITERAL}.items():
                of = [row for row in audited if (row["task"], row["teacher"], row["loss"]) == (task, teacher, loss)]
                axis.plot([r["epoch"] for r in of], [r[name] for r in of], label=label, color=colour, linestyle=line)
            axis.set(ylabel=text if not column else "", yscale="log" if name == "norm" else "linear")
        axes[0][column].set_title(f"{task}, {teacher}")
        axes[-1][column].set_xlabel("epoch")
    finish(figure, axes.flat, folder / "study_gradients.svg", ylabel=None)


def finish(figure: Any, axes: Any, path: Path, ylabel: str | None = "top-1, %") -> None:  # noqa: ANN401
    axes = list(axes)
    for axis in axes:
        axis.grid(alpha=0.25)
    if ylabel:
        axes[0].set_ylabel(ylabel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 2 * len(axes)), fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.05 * -(-len(labels) // (2 * len(axes))), 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
