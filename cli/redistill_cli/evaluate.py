"""`redistill evaluate`: how good a student is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.wording import harmless
from rich.table import Table

from redistill_cli.rendering import PLACE, archive_at, console, key_values, print_json

if TYPE_CHECKING:
    from redistill.evaluate import Evaluation

# Classes shown; --json has all.
SHOWN = 12


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or a file of weights.")],
    data: Annotated[str, typer.Option("--data", help="Labelled images: folder:PATH, cifar100:PATH?split=val, ...")],
    student: Annotated[
        str | None,
        typer.Option("--student", help="The network, for weights that do not say it: torchvision:resnet18"),
    ] = None,
    archive: Annotated[
        str | None,
        typer.Option("--archive", metavar=PLACE, help="The teacher over the same images: agreement and KL."),
    ] = None,
    teacher_names: Annotated[
        str | None,
        typer.Option("--teacher-names", help="Of the archive, a,b: the mean of their logits. [default: all]"),
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Side of a view. [default: the network's]")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 256,
    workers: Annotated[int | None, typer.Option("--workers", help="Rendering processes. [default: cores]")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="[default: on CUDA only]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Accuracy, likelihood and calibration of a student, by class, and beside its teacher where --archive knows it.

    Examples:

      redistill evaluate runs/r8x4 --data 'cifar100:data?split=val'

      redistill evaluate resnet18.pt --student torchvision:resnet18 --data folder:imagenet/val --json
    """
    from redistill.evaluate import evaluate as run_evaluation

    found = run_evaluation(
        run,
        data,
        student=student,
        archive=archive_at(archive),
        teachers=[] if teacher_names is None else teacher_names.split(","),
        size=size,
        device=device,
        amp=amp,
        batch_size=batch_size,
        workers=workers,
        allow_python=True,
    )
    if as_json:
        print_json(found.to_json())
    else:
        show(found)


def show(found: Evaluation) -> None:
    metrics = found.metrics
    rows: list[tuple[str, object]] = [
        ("weights", found.weights),
        ("images", f"{metrics.rows:,}, {found.images_per_second:.0f} images/s"),
        ("top-1", f"{metrics.top1:.2%}"),
        ("top-5", f"{metrics.top5:.2%}"),
        ("NLL", f"{metrics.nll:.4f}"),
        ("ECE", f"{metrics.ece:.4f} over {len(metrics.reliability)} bins of equal width"),
        ("Brier", f"{metrics.brier:.4f}"),
    ]
    teacher = metrics.teacher
    if teacher is not None:
        rows += [
            ("teacher's top-1", f"{teacher.teacher_top1:.2%}"),
            ("agreement", f"{teacher.agreement:.2%}"),
            ("KL to the teacher", f"{teacher.kl_t1:.4f} at T = 1, {teacher.kl:.4f} at T = {teacher.temperature:g}"),
            ("where it is right", share(teacher.top1_where_teacher_right, teacher.teacher_right_rows)),
            ("where it is wrong", share(teacher.top1_where_teacher_wrong, teacher.teacher_wrong_rows)),
        ]
    key_values(rows)
    worst = sorted((value, label) for label, value in enumerate(metrics.per_class) if value is not None)[:SHOWN]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"hardest of {len(metrics.per_class)} classes")
    table.add_column("top-1", justify="right")
    for value, label in worst:
        table.add_row(harmless(label if found.class_names is None else found.class_names[label]), f"{value:.2%}")
    console.print()
    console.print(table)


def share(value: float | None, rows: int) -> str:
    return f"top-1 {value:.2%} of {rows:,} images" if value is not None else "no such image"
