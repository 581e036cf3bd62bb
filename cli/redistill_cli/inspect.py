"""`redistill inspect`: the contents of an archive."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from redistill_cache.errors import RedistillError
from redistill_cache.wording import harmless, human_bytes
from rich.table import Table

from redistill_cli.rendering import (
    ARCHIVE_HELP,
    PATH_OR_URL,
    Offline,
    console,
    held_part,
    key_values,
    note,
    print_json,
    set_offline,
)

SHOWN_VIEWS = 16


def inspect(
    archive: Annotated[str, typer.Argument(metavar=PATH_OR_URL, help=ARCHIVE_HELP)],
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Describe the contents of an archive.

    Prints id, samples, views, recipe, licence, and codec, size and fidelity of
    every teacher output. Unfinished archives are described up to their last
    commit. Of an archive at a URL only the metadata are fetched.

    Examples:

    \b
      redistill inspect teacher.redistill.zarr
      redistill inspect teacher.redistill.zarr --json
    """
    from redistill_cache.inspect import describe_at

    set_offline(offline)
    description = describe_at(archive, notify=note)
    if as_json:
        print_json(description)
        return
    show_summary(description)
    show_teachers(description)


def show_summary(description: dict[str, Any]) -> None:
    d = description
    parameters = ", ".join(f"{name} {size:.1f}" for name, size in d["view_parameters"].items())
    key_values(
        [
            ("archive", d["path"]),
            ("id", d["id"] or "not sealed"),
            ("state", state(d)),
            *subset_of(d["subset_of"]),
            ("samples", f"{d['num_samples']:,}, {len(d['excluded'])} excluded"),
            ("views", f"{d['num_views']:,}{fewer_views(d)}"),
            ("classes", f"{d['num_classes']:,}"),
            ("size", f"{human_bytes(d['total_bytes'])}, {d['bytes_per_view']:.1f} bytes per view in total"),
            ("recipe", typed_recipe(d["recipe"])),
            ("view params", f"{parameters or 'none'} (bytes per view)"),
            ("canaries", f"{d['canaries_per_view']} per view" if d["canaries_per_view"] else "no canaries"),
            ("licence", d["licence"] or "not stated"),
            ("citation", d["citation"] or "not stated"),
            ("images from", d["data_source"] or "not stated"),
            ("image licence", d["data_licence"] or "not stated"),
            ("teacher licence", d["teacher_licence"] or "not stated"),
        ]
    )


def state(description: dict[str, Any]) -> str:
    if description["complete"]:
        return "complete"
    if description["id"] is None:
        return f"unfinished, {description['committed_blocks']} blocks committed"
    held = held_part(description["num_views"], description["sealed_views"], description["lacking"])
    return f"a copy that {held}"


def subset_of(parent: dict[str, Any] | None) -> list[tuple[str, object]]:
    """The archive that a subset was taken from, and which of its views these are."""
    if parent is None:
        return []
    views = ", ".join(map(str, parent["views"][:SHOWN_VIEWS])) + ", ..." * (len(parent["views"]) > SHOWN_VIEWS)
    return [("subset of", f"{parent['id']}, its views {views}")]


def fewer_views(description: dict[str, Any]) -> str:
    """The teachers that do not have all views."""
    return "".join(
        f"; teacher {name} has {views:,}"
        for name, views in description["teacher_views"].items()
        if views < description["num_views"]
    )


def typed_recipe(recipe: dict[str, Any]) -> str:
    """As --recipe takes it; the JSON as it is where this version does not know the recipe."""
    from redistill.views.recipe import Recipe
    from redistill.views.recipe_spec import recipe_text

    try:
        return recipe_text(Recipe.from_json(recipe))
    except RedistillError:
        return json.dumps(recipe) if recipe else "none"


# What the bound of a signal is about, by its metric, and the errors that are shown beside it.
METRICS = {
    "kl": ("KL", ("kl_t1", "kl_t4"), "KL: of the teacher's softmax from the stored one, at T=1 and T=4"),
    "centred": ("centred", ("centred",), "centred: |error| relative to the distance of the row from the mean row"),
    "relative": ("relative", ("relative",), "relative: |error| relative to |row|"),
}


def show_teachers(description: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("teacher", "signal", "codec", "width", "views", "B/view", "bound", "mean error", "max error")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    notes: dict[str, None] = {}
    for name, signals in description["teachers"].items():
        for signal, stored in signals.items():
            fidelity = stored["fidelity"] or {}
            metric, errors, notes_of = METRICS.get(str(fidelity.get("metric")), ("", (), ""))
            notes[notes_of] = None
            bound = "-" if fidelity.get("bound") is None else f"{metric} {fidelity['bound']:.2g}"
            mean, most = (numbers_of(fidelity, [f"{kind}_{error}" for error in errors]) for kind in ("mean", "max"))
            table.add_row(
                *map(harmless, (name, signal, stored["codec"])),
                f"{stored['width']:,}",
                f"{stored['views']:,}",
                f"{stored['bytes_per_view']:.1f}",
                bound,
                mean,
                most,
            )
    console.print()
    console.print(table)
    for text in filter(None, notes):
        console.print(text)


def numbers_of(fidelity: dict[str, Any], keys: list[str]) -> str:
    return " ".join(f"{fidelity[key]:.1e}" if fidelity.get(key) is not None else "-" for key in keys) or "-"
