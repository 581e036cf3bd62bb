"""`redistill cache-teacher`: stage 1."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.addresses import redact
from redistill_cache.spec import LOGITS
from redistill_cache.wording import human_bytes

from redistill.caching.options import CacheOptions
from redistill_cli.options import collect, takes
from redistill_cli.rendering import TerminalProgress, human_seconds, key_values, print_json

if TYPE_CHECKING:
    from redistill.caching import CacheResult
    from redistill.caching.estimate import Estimate


@takes(CacheOptions)
def cache_teacher(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate size and time from a small pilot; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **values: object,
) -> None:
    """Write an archive of a teacher's logits and features.

    Runs the teacher once over augmented views of every image. Run the same
    command again to resume after an interruption: committed blocks are not
    recomputed. With --signals, layers are stored too; those that a finished
    teacher lacks are added to it, over the same views. Under torchrun the ranks share the work; the archive is
    byte-identical for any number of ranks.

    Examples:

    \b
      redistill cache-teacher folder:imagenet/train --views 8 \\
        --teacher 'torchvision:resnet50?weights=DEFAULT' \\
        --out resnet50.redistill.zarr --dry-run

    \b
      redistill cache-teacher cifar100:data --views 40 --recipe cifar \\
        --teacher 'cifar:resnet32x4?weights=r32x4.pt' \\
        --out r32x4.redistill.zarr

    \b
      torchrun --nproc-per-node=8 -m redistill_cli cache-teacher \\
        'wds:train-{0000..0146}.tar' --views 8 \\
        --teacher 'torchvision:resnet50?weights=DEFAULT' \\
        --out resnet50.redistill.zarr
    """
    # Before torch is imported, which takes seconds.
    options = CacheOptions(**collect(CacheOptions, values), allow_python=True, command=without_secrets(sys.argv[1:]))
    from redistill.caching import cache_teacher as run
    from redistill.caching import estimate_cache
    from redistill.ranks import Rank

    first = Rank.from_environment().first
    if dry_run and not first:
        return
    with TerminalProgress() as progress:
        if dry_run:
            estimate = estimate_cache(options, progress)
            print_json(estimate.to_json()) if as_json else show_estimate(estimate)
            return
        result = run(options, progress)
    if first:
        print_json(result.to_json()) if as_json else show_result(result)


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
        ("time", f"{human_seconds(estimate.seconds)}, {estimate.device_hours:.2f} device hours over all ranks"),
        ("break-even", estimate.break_even),
    ]
    if estimate.teacher_top1 is not None:
        rows.append(("teacher", f"top-1 {estimate.teacher_top1:.1%} on these views"))
    rows += [(f"codec of {name}", reason) for name, reason in estimate.codecs.items()]
    key_values(rows)


def show_result(result: CacheResult) -> None:
    speed = f", {result.images_per_second:.1f} images/s" if result.images_per_second else ""
    top1 = f", top-1 {result.teacher_top1:.1%}" if result.teacher_top1 is not None else ""
    computed = f"{result.images:,} views computed" if result.images else "already complete"
    unfinished = f"not sealed yet, incomplete: {', '.join(result.missing) or 'blocks of another process'}"
    rows: list[tuple[str, object]] = [
        ("archive", result.path),
        ("id", result.id or unfinished),
        ("views", f"{result.views:,} per sample, {result.samples:,} samples"),
        ("teacher", f"{result.teacher}, {computed}{top1}"),
        ("signals", ", ".join(result.signals) + ("" if LOGITS in result.signals else ", and no logits")),
        ("time", f"{human_seconds(result.seconds)}{speed}"),
        ("size", f"{human_bytes(result.total_bytes)}, teacher outputs {result.bytes_per_view:.1f} bytes per view"),
    ]
    key_values(rows)
