"""`redistill demo`: both stages in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from redistill_cli.rendering import TerminalProgress, console, human_seconds, print_json

if TYPE_CHECKING:
    from redistill.demo import Summary


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for all outputs.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run both stages on synthetic images in a few minutes.

    Needs neither a GPU nor a network connection. Caches a teacher that was
    trained on 60 times as many images as the students, and trains students with
    three losses on its logits and one on its features; then trains again with a
    fifth of the teacher's logits replaced by confidently wrong ones. Finished
    steps are not repeated.

    Examples:

    \b
      redistill demo --out demo
    """
    from redistill.demo import run_demo

    with TerminalProgress(brief=True) as progress:
        summary = run_demo(out, progress)
    if as_json:
        print_json(summary.to_json())
    else:
        show(summary, out)


def show(summary: Summary, out: Path) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("student's loss")
    for column in ("top-1", "with misled teacher"):
        table.add_column(column, justify="right")
    names = {"ce": "labels only", "kl": "KL (Hinton)", "power": "power divergence", "features": "features"}
    for loss, name in names.items():
        accuracies = [students[loss] for students in (summary.students, summary.misled) if loss in students]
        table.add_row(name, *(f"{accuracy.top1_mean:.1%} ± {accuracy.top1_sd:.1%}" for accuracy in accuracies))
    seeds = summary.students["power"].n
    typer.echo(f"\nteacher: {summary.teacher_top1:.1%} on unseen images. Students, mean ± sd over {seeds} seeds:\n")
    console.print(table)
    typer.echo(
        "\nThis is one task and little training. In a larger study, the power divergence was better than KL on"
        "\ntwo tasks of four where the teacher was confidently wrong, else mostly equal: docs/LOSSES.md."
    )
    storage, speed = summary.storage, summary.speed
    typer.echo(
        f"\narchive: {storage.archived:.1f} bytes per view (float16 logits {storage.float16:.0f}, "
        f"top-10 {storage.top10:.0f}), and {storage.features:.1f} of features"
        f"\nspeed:   {speed.cached:.0f} images/s from the archive, {speed.online:.0f} with an online teacher "
        f"({speed.ratio:.2f}x)"
        f"\ntime:    {human_seconds(summary.seconds)}\n"
        f"\nopen {out / 'report.html'}; then try: redistill inspect {out / 'teacher.redistill.zarr'}"
    )
