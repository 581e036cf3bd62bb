"""`redistill cache-teacher`: stage 1."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.addresses import redact
from redistill_cache.errors import UsageError
from redistill_cache.spec import LOGITS
from redistill_cache.wording import harmless, human_bytes
from rich.table import Table
from rich.text import Text

from redistill.caching.options import CacheOptions
from redistill.sharing.terms import missing_for_publishing, publishing_advice
from redistill_cli.options import collect, takes
from redistill_cli.rendering import TerminalProgress, console, human_seconds, key_values, print_json

if TYPE_CHECKING:
    from redistill.caching import CacheResult
    from redistill.caching.estimate import Estimate
    from redistill.caching.rank_layers import LayerRanking


@takes(CacheOptions)
def cache_teacher(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate size and time from a small pilot; write nothing.")
    ] = False,
    rank_layers: Annotated[
        bool,
        typer.Option(
            "--rank-layers", help="With --dry-run: also rank the layers by their quality for distillation, as advice."
        ),
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="With --rank-layers: an HTML page with a chart.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **values: object,
) -> None:
    """Write an archive of a teacher's logits and features.

    Runs the teacher once over augmented views of every image. Run the same
    command again to resume after an interruption: committed blocks are not
    recomputed. With --signals, layers are stored too; those that a finished
    teacher lacks are added to it, over the same views. Several processes
    share the work: under torchrun or srun, as a SLURM array, or with
    --share. The archive is byte-identical for any number of them.

    Examples:

    \b
      redistill cache-teacher folder:imagenet/train --views 8 \\
        --teacher 'torchvision:resnet50?weights=DEFAULT' \\
        --out resnet50.redistill.zarr --dry-run

    \b
      redistill cache-teacher folder:imagenet/train \\
        --teacher 'torchvision:resnet50?weights=DEFAULT' \\
        --out resnet50.redistill.zarr --dry-run --rank-layers

    \b
      redistill cache-teacher cifar100:data --views 40 --recipe cifar \\
        --teacher 'cifar:resnet32x4?weights=r32x4.pt' \\
        --out r32x4.redistill.zarr

    \b
      redistill cache-teacher folder:imagenet/train \\
        --teacher 'torchvision:resnet50?weights=DEFAULT' \\
        --out resnet50.redistill.zarr --signals layer3,penultimate

    \b
      torchrun --nproc-per-node=8 -m redistill_cli cache-teacher \\
        'wds:train-{0000..0146}.tar' --views 8 \\
        --teacher 'torchvision:resnet50?weights=DEFAULT' \\
        --out resnet50.redistill.zarr
    """
    # Before torch is imported, which takes seconds.
    for flag, is_set, needed, has_needed in (
        ("--rank-layers", rank_layers, "--dry-run", dry_run),
        ("--page", page is not None, "--rank-layers", rank_layers),
    ):
        if is_set and not has_needed:
            raise UsageError(f"{flag} has no effect without {needed}; add {needed}")
    options = CacheOptions(**collect(CacheOptions, values), allow_python=True, command=without_secrets(sys.argv[1:]))
    from redistill.caching import cache_teacher as run
    from redistill.caching import estimate_cache
    from redistill.shares import Share

    reports = Share.of(options.share).reports
    if dry_run and not reports:
        return
    with TerminalProgress() as progress:
        if dry_run:
            estimate = estimate_cache(options, progress)
            ranking = rank(options, page, progress) if rank_layers else None
            layers = {} if ranking is None else {"layers": ranking.to_json()}
            print_json(estimate.to_json() | layers) if as_json else show_estimate(estimate)
            if ranking is not None and not as_json:
                show_ranking(ranking)
            return
        result = run(options, progress)
    if reports:
        print_json(result.to_json()) if as_json else show_result(result)


def rank(options: CacheOptions, page: Path | None, progress: TerminalProgress) -> LayerRanking:
    from redistill.caching.rank_layers import rank_layers
    from redistill.report.layers import write_layers_page

    ranking = rank_layers(options, progress)
    if page is not None:
        write_layers_page(ranking, page)
    return ranking


def without_secrets(arguments: list[str]) -> str:
    """The command line as recorded in the archive: values that look like passwords or tokens are masked."""
    return " ".join(map(redact, arguments))


def show_estimate(estimate: Estimate) -> None:
    speed = f"{estimate.images_per_second:.1f} images/s on {estimate.device}"
    rows: list[tuple[str, object]] = [
        ("samples", f"{estimate.samples:,}"),
        ("views", f"{estimate.views:,} per sample, in {estimate.blocks:,} blocks and {estimate.files:,} files"),
        (
            "size",
            f"{human_bytes(estimate.total_bytes)}, teacher outputs {estimate.bytes_per_view:.1f} bytes per view",
        ),
        ("disk", f"{human_bytes(estimate.free_bytes)} free"),
        ("speed", f"{speed}, measured on {estimate.pilot_rows:,} views"),
        ("time", f"{human_seconds(estimate.seconds)}, {estimate.device_hours:.2f} device hours over all processes"),
        ("break-even", estimate.break_even),
    ]
    if estimate.teacher_top1 is not None:
        rows.append(("teacher", f"top-1 {estimate.teacher_top1:.1%} on these views"))
    rows += [(f"codec of {name}", reason) for name, reason in estimate.codecs.items()]
    key_values(rows)


def show_ranking(ranking: LayerRanking) -> None:
    from redistill.caching.rank_layers import ADVICE

    headings = ("layer", "output", "rank", "Q", "S", "I", "E", "Q pooled")
    shown = Table(title=f"layers, on {ranking.images:,} images of {ranking.classes:,} classes", box=None)
    for place, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if place < 2 else "right")
    for row in ranking.table():
        shown.add_row(*map(harmless, row))
    console.print(shown)
    console.print(Text(ADVICE))


def show_result(result: CacheResult) -> None:
    speed = f", {result.images_per_second:.1f} images/s" if result.images_per_second else ""
    top1 = f", top-1 {result.teacher_top1:.1%}" if result.teacher_top1 is not None else ""
    computed = f"{result.images:,} views computed" if result.images else "already complete"
    unfinished = f"not sealed yet: other processes have yet to write blocks of {', '.join(result.missing)}"
    rows: list[tuple[str, object]] = [
        ("archive", result.path),
        ("id", result.id or unfinished),
        ("views", f"{result.views:,} per sample, {result.samples:,} samples"),
        ("teacher", f"{result.teacher}, {computed}{top1}"),
        ("signals", ", ".join(result.signals) + ("" if LOGITS in result.signals else ", and no logits")),
        ("time", f"{human_seconds(result.seconds)}{speed}"),
        ("size", f"{human_bytes(result.total_bytes)}, teacher outputs {result.bytes_per_view:.1f} bytes per view"),
    ]
    if result.id and (missing := missing_for_publishing(result.path)):
        rows.append(("publishing", publishing_advice(result.path, missing)))
    key_values(rows)
