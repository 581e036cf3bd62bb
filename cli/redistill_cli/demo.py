"""`redistill demo`: everything in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from redistill_cli.rendering import TerminalProgress, console, human_seconds, print_json

if TYPE_CHECKING:
    from redistill.demo import Summary


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Both stages on drawn images, on a CPU and without network: a teacher, its archive, students by three losses.

    The teacher was trained on twenty times as many images as the students see. Then the same with a teacher that is
    confidently wrong about a fifth of what it is asked. A second run takes up what is there.

    Examples:

      redistill demo --out demo
    """
    from redistill.demo import run_demo

    with TerminalProgress(last_member_only=True) as progress:
        found = run_demo(out, progress)
    if as_json:
        print_json(found.to_json())
    else:
        show(found, out)


def show(found: Summary, out: Path) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("student's loss")
    for column in ("top-1", "with a misled teacher"):
        table.add_column(column, justify="right")
    names = {"ce": "labels only", "kl": "KL (Hinton)", "power": "power divergence"}
    for name, text in names.items():
        cells = [f"{f[name].top1_mean:.1%} ± {f[name].top1_sd:.1%}" for f in (found.students, found.misled)]
        table.add_row(text, *cells)
    seeds = found.students["power"].n
    typer.echo(f"\nteacher: {found.teacher_top1:.1%} of unseen images. Students, mean ± sd of {seeds} seeds:\n")
    console.print(table)
    kept, speed = found.storage, found.speed
    typer.echo(
        f"\narchive: {kept.archived:.1f} bytes a view; float16 logits {kept.float16:.0f}, top-10 {kept.top10:.0f}"
        f"\nspeed:   {speed.cached:.0f} images/s from the archive, {speed.online:.0f} with the teacher beside the "
        f"student: {speed.ratio:.2f} times"
        f"\ntime:    {human_seconds(found.seconds)}\n"
        f"\nopen {out / 'report.html'}; then try: redistill inspect {out / 'teacher.redistill.zarr'}"
    )
