"""`redistill inspect`: what an archive is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from redistill_cache.wording import harmless, human_bytes
from rich.table import Table

from redistill_cli.rendering import archive_at, console, key_values, print_json


def inspect(
    archive: Annotated[
        str,
        typer.Argument(metavar="ARCHIVE", help="A folder like name.redistill.zarr, or its URL."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what an archive is: id, samples, views, teachers, codecs, bytes, fidelity, recipe, licence.

    An archive that is not finished yet is described as far as it is committed.

    Examples:

      redistill inspect teacher.redistill.zarr

      redistill inspect teacher.redistill.zarr --json
    """
    from redistill_cache.inspect import describe
    from redistill_cache.reader import open_archive

    found = describe(open_archive(archive_at(archive), allow_partial=True))
    if as_json:
        print_json(found)
        return
    _summary(found)
    _teachers(found)


def _summary(found: dict[str, Any]) -> None:
    state = "complete" if found["complete"] else f"not finished: {found['committed_blocks']} blocks are committed"
    listed = found["recipe"].get("ops", [])  # of a stranger: it may be anything
    items = listed if isinstance(listed, list) else [listed]
    ops = ", ".join(str(op.get("op", op)) if isinstance(op, dict) else str(op) for op in items)
    parameters = ", ".join(f"{name} {size:.1f}" for name, size in found["view_parameters"].items())
    key_values(
        [
            ("archive", found["path"]),
            ("id", found["id"] or "none until it is sealed"),
            ("state", state),
            ("samples", f"{found['num_samples']:,}, {len(found['excluded'])} excluded"),
            ("views", f"{found['num_views']:,}"),
            ("classes", f"{found['num_classes']:,}"),
            ("size", f"{human_bytes(found['total_bytes'])}, {found['bytes_per_view']:.1f} bytes a view in all"),
            ("recipe", ops or "none"),
            ("view parameters", f"{parameters or 'none'} (bytes a view)"),
            ("canaries", f"{found['canaries_per_view']} a view"),
            ("licence", found["licence"] or "not stated"),
            ("citation", found["citation"] or "not stated"),
        ]
    )


def _teachers(found: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("teacher", "signal", "codec", "B/view", "bound", "mean KL T=1", "T=4", "max KL T=1", "T=4")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for name, signals in found["teachers"].items():
        for signal, what in signals.items():
            fidelity = what["fidelity"] or {}
            keys = ("bound", "mean_kl_t1", "mean_kl_t4", "max_kl_t1", "max_kl_t4")
            numbers = [f"{fidelity[key]:.2g}" if fidelity.get(key) is not None else "-" for key in keys]
            table.add_row(
                harmless(name), harmless(signal), harmless(what["codec"]), f"{what['bytes_per_view']:.1f}", *numbers
            )
    console.print()
    console.print(table)
