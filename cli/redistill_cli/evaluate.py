"""`redistill evaluate`: metrics of a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.wording import harmless
from rich.table import Table

from redistill.sources import OnBadImage
from redistill_cli.options import split
from redistill_cli.rendering import PATH_OR_URL, Offline, console, key_values, local_archive, print_json, set_offline

if TYPE_CHECKING:
    from redistill.evaluate import Evaluation

# Classes in the table; --json has all.
SHOWN = 12


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or weights file.")],
    data: Annotated[
        str,
        typer.Option("--data", metavar="DATA", help="Labelled images: folder:PATH, cifar100:PATH?split=val, ..."),
    ],
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="MODEL",
            help="Network, such as torchvision:resnet18, if the weights file does not name it.",
        ),
    ] = None,
    archive: Annotated[
        str | None,
        typer.Option(
            "--archive",
            metavar=PATH_OR_URL,
            help="Archive of the same images, for agreement with and KL to the teacher.",
        ),
    ] = None,
    teacher_names: Annotated[
        str | None,
        typer.Option(
            "--teacher-names",
            metavar="A,B",
            help="Teachers of the archive; the mean of their logits is used. [default: all]",
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side of a view in pixels. [default: as in the student's training]")
    ] = None,
    on_bad_image: Annotated[
        OnBadImage,
        typer.Option("--on-bad-image", help="What to do with an image that cannot be decoded."),
    ] = "fail",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Batch size.")] = 256,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Rendering processes. [default: one per CPU core]")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Device: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    amp: Annotated[
        bool | None, typer.Option("--amp/--no-amp", help="Evaluate in bfloat16. [default: on CUDA only]")
    ] = None,
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure accuracy and calibration of a student.

    Prints top-1, top-5, NLL, ECE, Brier score and accuracy per class; with
    --archive also agreement with the teacher and KL to it.

    Examples:

    \b
      redistill evaluate runs/r8x4 --data 'cifar100:data?split=val'

    \b
      redistill evaluate resnet18.pt --student torchvision:resnet18 \\
        --data folder:imagenet/val --json
    """
    from redistill.evaluate import evaluate as run_evaluation

    set_offline(offline)
    evaluation = run_evaluation(
        run,
        data,
        student=student,
        archive=local_archive(archive),
        teachers=split(teacher_names or ""),
        size=size,
        on_bad_image=on_bad_image,
        device=device,
        amp=amp,
        batch_size=batch_size,
        workers=workers,
        allow_python=True,
    )
    if as_json:
        print_json(evaluation.to_json())
    else:
        show(evaluation)


def show(evaluation: Evaluation) -> None:
    metrics = evaluation.metrics
    rows: list[tuple[str, object]] = [
        ("weights", evaluation.weights),
        ("images", f"{metrics.rows:,}, {evaluation.images_per_second:.0f} images/s"),
        ("top-1", f"{metrics.top1:.2%}"),
        ("top-5", f"{metrics.top5:.2%}"),
        ("NLL", f"{metrics.nll:.4f}"),
        ("ECE", f"{metrics.ece:.4f} ({len(metrics.reliability)} bins of equal width)"),
        ("Brier", f"{metrics.brier:.4f}"),
    ]
    teacher = metrics.teacher
    if teacher is not None:
        rows += [
            ("teacher top-1", f"{teacher.teacher_top1:.2%}"),
            ("agreement", f"{teacher.agreement:.2%}"),
            ("KL to teacher", f"{teacher.kl_t1:.4f} at T = 1, {teacher.kl:.4f} at T = {teacher.temperature:g}"),
            ("teacher correct", share(teacher.top1_where_teacher_right, teacher.teacher_right_rows)),
            ("teacher wrong", share(teacher.top1_where_teacher_wrong, teacher.teacher_wrong_rows)),
        ]
    key_values(rows)
    worst = sorted((value, label) for label, value in enumerate(metrics.per_class) if value is not None)[:SHOWN]
    names = evaluation.class_names
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"lowest {len(worst)} of {len(metrics.per_class)} classes")
    table.add_column("top-1", justify="right")
    for value, label in worst:
        table.add_row(harmless(label if names is None else names[label]), f"{value:.2%}")
    console.print()
    console.print(table)


def share(value: float | None, rows: int) -> str:
    return f"student top-1 {value:.2%} on {rows:,} images" if value is not None else "no images"
