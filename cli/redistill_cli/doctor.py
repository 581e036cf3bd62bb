"""`redistill doctor`: how fast this machine is, and what limits training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.wording import harmless

from redistill_cli.rendering import PATH_OR_URL, key_values, local_archive, print_json

if TYPE_CHECKING:
    from redistill.doctor import Diagnosis


def doctor(
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Measure with these images instead of synthetic ones.")
    ] = None,
    archive: Annotated[
        str | None,
        typer.Option("--archive", metavar=PATH_OR_URL, help="Also measure reading and decoding this archive."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="Say what caching this teacher's logits will be limited by."),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option("--student", metavar="MODEL", help="Measure this student instead of a small one."),
    ] = None,
    archive_dir: Annotated[
        Path | None,
        typer.Option("--archive-dir", metavar="DIR", help="Measure and try the disk of this folder, not the current."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure this machine and find bottlenecks.

    Lists versions and devices, measures disk, rendering, the teacher, encoding
    and training for a few seconds each, says what limits both stages and how
    many workers would balance them, and suggests what to change.

    Examples:

    \b
      redistill doctor --data folder:imagenet/train \\
        --archive resnet50.redistill.zarr
      redistill doctor --teacher 'torchvision:resnet50?weights=DEFAULT' \\
        --data folder:imagenet/train --archive-dir /data
    """
    from redistill.doctor import examine

    diagnosis = examine(data, local_archive(archive), archive_dir, teacher=teacher, student=student, allow_python=True)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        show(diagnosis)


def show(diagnosis: Diagnosis) -> None:
    d = diagnosis
    versions = ", ".join(f"{name} {text}" for name, text in d.versions.items() if text is not None)
    memory = "" if d.memory_gib is None else f", {d.memory_gib:.1f} GiB of memory"
    cores = d.cores if d.cores == d.machine_cores else f"{d.cores} of {d.machine_cores}"
    rows: list[tuple[str, object]] = [
        ("versions", f"python {d.python}, {versions}"),
        ("machine", f"{d.system}, {cores} cores{memory}"),
        ("devices", ", ".join(d.devices)),
        (
            "disk",
            f"{d.disk_free_gib:.1f} GiB free, {d.disk_write_mib_per_second:.0f} MiB/s durable writes to this folder",
        ),
        (
            "file system",
            "; ".join(f"{name}: {problem or 'yes'}" for name, problem in d.file_system.items())
            + f"; blocks are committed by {d.commits_by or 'neither, so no archive can be written'}",
        ),
        ("workers", f"{d.workers} by default, start method {d.worker_start}"),
        ("views", f"{d.views_per_second_and_core:.0f}/s per core at {d.view_size} px ({harmless(d.data)})"),
        (
            "student",
            f"{d.student_images_per_second:.0f} images/s forward and backward, {harmless(d.student)}, "
            f"{d.precision}, batch of {d.student_batch}",
        ),
    ]
    if d.teacher is not None and d.encoded_rows_per_second is not None:
        of_core = " a core" if d.devices == ["cpu"] else ""
        rows += [
            (
                "teacher",
                f"{d.teacher_images_per_second:.0f} images/s, {harmless(d.teacher)}, {d.precision}, "
                f"batch of {d.teacher_batch}",
            ),
            ("encoder", f"{d.encoded_rows_per_second:,.0f} rows/s{of_core}, {d.encoded_bytes_per_row:.0f} bytes a row"),
        ]
    if d.archive_load_rows_per_second is not None and d.archive_decode_rows_per_second is not None:
        load, decode = d.archive_load_rows_per_second, d.archive_decode_rows_per_second
        rows.append(("archive", f"{load:,.0f} rows/s from disk, {decode:,.0f} rows/s decoded"))
    for name, stage in (("stage 1", d.stage1), ("stage 2", d.stage2)):
        if stage is not None:
            alone = ", ".join(f"{part} {rate:,.0f}" for part, rate in stage.rates.items())
            limit = f"limited by the {stage.limit} (images/s of each alone: {alone})"
            rows.append(
                (
                    name,
                    f"about {stage.images_per_second:,.0f} images/s, {limit}; "
                    f"balanced by {stage.workers} worker{'s' * (stage.workers != 1)}",
                )
            )
    rows += [("advice" if i == 0 else "", text) for i, text in enumerate(d.advice)]
    key_values(rows)
