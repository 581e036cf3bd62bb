"""`redistill doctor`: what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer
from redistill_cache.wording import harmless

from redistill_cli.rendering import PLACE, archive_at, key_values, print_json


def doctor(
    data: Annotated[str | None, typer.Option("--data", help="Measure with these images.")] = None,
    archive: Annotated[
        str | None,
        typer.Option("--archive", metavar=PLACE, help="Measure reading this archive, too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what this machine has, how fast its parts are, what will limit training, and what to do about it.

    Takes some seconds. Example:

      redistill doctor --data folder:imagenet/train --archive resnet50.redistill.zarr
    """
    from redistill.doctor import examine

    found = examine(data, archive_at(archive))
    if as_json:
        print_json(found.to_json())
        return
    versions = ", ".join(f"{name} {text}" for name, text in found.versions.items() if text is not None)
    memory = "" if found.memory_gib is None else f", {found.memory_gib:.1f} GiB of memory"
    cores = found.cores if found.cores == found.machine_cores else f"{found.cores} of {found.machine_cores}"
    disk = f"{found.disk_free_gib:.1f} GiB free, {found.disk_write_mib_per_second:.0f} MiB/s durable writes here"
    rows: list[tuple[str, object]] = [
        ("versions", f"python {found.python}, {versions}"),
        ("machine", f"{found.system}, {cores} cores{memory}"),
        ("devices", ", ".join(found.devices)),
        ("disk", disk),
        ("workers", f"{found.workers} by default, started by {found.worker_start}"),
        (
            "views",
            f"{found.views_per_second_and_core:.0f} of {found.view_size} px a second and core ({harmless(found.data)})",
        ),
        ("student", f"{found.student_images_per_second:.0f} images/s forward and backward, {found.student}"),
    ]
    if found.archive_load_rows_per_second is not None and found.archive_decode_rows_per_second is not None:
        load, decode = found.archive_load_rows_per_second, found.archive_decode_rows_per_second
        rows.append(("archive", f"{load:,.0f} rows/s from disk, {decode:,.0f} rows/s decoded"))
    rows.append(("limit", found.limit))
    rows += [("advice" if i == 0 else "", text) for i, text in enumerate(found.advice)]
    key_values(rows)
