"""`redistill cache-teacher`: stage 1."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from redistill_cache.wording import human_bytes

from redistill_cli.rendering import TerminalProgress, human_seconds, key_values, print_json

if TYPE_CHECKING:
    from redistill.caching import CacheResult
    from redistill.caching.estimate import Estimate

SECRET = re.compile(r"(?i)((?:token|secret|password|passwd|api[_-]?key|access[_-]?key|sig)[^=&\s]*=)[^&\s]+")
USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+@")


def cache_teacher(
    data: Annotated[str, typer.Argument(help="The images: folder:PATH, cifar100:PATH, wds:PATTERN, ..., or a path.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The teacher: torchvision:resnet50?weights=DEFAULT, ...")],
    out: Annotated[Path, typer.Option("--out", help="The archive to write or to continue.")],
    views: Annotated[int, typer.Option("--views", help="Views of every image; an epoch of training reads one.")] = 1,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Augmentation: center, rrc, cifar with ?options, or a TOML file.")
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Side of a view. [default: the teacher's input]")] = None,
    codec: Annotated[str, typer.Option("--codec", help="auto, linear, compander, float16 or float32.")] = "auto",
    fidelity: Annotated[
        float, typer.Option("--fidelity", help="Bound on KL(teacher || stored) of every row, at T = 1 and T = 4.")
    ] = 1e-3,
    feature_fidelity: Annotated[
        float, typer.Option("--feature-fidelity", help="Bound on the relative error of every row of features.")
    ] = 0.02,
    signals: Annotated[
        str, typer.Option("--signals", help="What to keep: logits, and layers such as layer3 or penultimate.")
    ] = "logits",
    keep_shift: Annotated[
        bool, typer.Option("--keep-shift", help="Keep the mean of each row of logits, for losses on raw logits.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Views the teacher answers for at once.")] = 128,
    workers: Annotated[int | None, typer.Option("--workers", help="Rendering processes. [default: cores]")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    amp: Annotated[
        bool | None, typer.Option("--amp/--no-amp", help="bfloat16 forward pass. [default: on CUDA only]")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the teacher.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Decides every view.")] = 0,
    teacher_name: Annotated[
        str | None, typer.Option("--teacher-name", help="Name in the archive; another one adds a teacher.")
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="Licence of the archive.")] = "",
    citation: Annotated[str, typer.Option("--citation", help="How to cite the archive.")] = "",
    block_rows: Annotated[
        int | None, typer.Option("--block-rows", help="Rows committed together. [default: by the number of samples]")
    ] = None,
    on_bad_image: Annotated[str, typer.Option("--on-bad-image", help="fail, or exclude (and list it).")] = "fail",
    extend_views: Annotated[
        bool, typer.Option("--extend-views", help="Add views to an archive, up to --views; nothing is redone.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would cost; runs the teacher on a pilot.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Run a teacher once over augmented views of images, and keep what it says in an archive.

    The same command continues after any interruption; committed blocks are never done again. Under torchrun the
    processes share the work, and the archive is the same to the byte.

    Examples:

      redistill cache-teacher folder:imagenet/train --teacher torchvision:resnet50?weights=DEFAULT --views 8
      --out resnet50.redistill.zarr --dry-run

      redistill cache-teacher cifar100:data --teacher 'cifar:resnet32x4?weights=r32x4.pt' --views 40
      --recipe cifar --out r32x4.redistill.zarr

      torchrun --nproc-per-node=8 -m redistill_cli cache-teacher wds:'train-{0000..0146}.tar' --teacher ... --out ...
    """
    # The encoder multiplies many small matrices, while the teacher needs the cores: with more threads than one it takes
    # twice the processor time. Read when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from redistill_cache.errors import UsageError

    from redistill.caching import CacheOptions, estimate_cache
    from redistill.caching import cache_teacher as cache
    from redistill.ranks import Rank

    if dry_run and not Rank.from_environment().first:
        return  # the first rank speaks for all
    if on_bad_image not in ("fail", "exclude"):
        raise UsageError(f"expected --on-bad-image fail or exclude, found {on_bad_image!r}")
    options = CacheOptions(
        data=data,
        teacher=teacher,
        views=views,
        out=out,
        recipe=recipe,
        size=size,
        codec=codec,
        fidelity=fidelity,
        feature_fidelity=feature_fidelity,
        signals=tuple(name.strip() for name in signals.split(",") if name.strip()),
        keep_shift=keep_shift,
        batch_size=batch_size,
        workers=workers,
        device=device,
        amp=amp,
        compile=compile_,
        seed=seed,
        teacher_name=teacher_name,
        licence=licence,
        citation=citation,
        block_rows=block_rows,
        on_bad_image="exclude" if on_bad_image == "exclude" else "fail",
        extend_views=extend_views,
        allow_python=True,
        command=without_secrets(sys.argv[1:]),
    )
    with TerminalProgress() as progress:
        if dry_run:
            found = estimate_cache(options, progress)
        else:
            done = cache(options, progress)
    if not Rank.from_environment().first:
        return  # the first rank speaks for all
    if dry_run:
        print_json(found.to_json()) if as_json else show_estimate(found)
    elif as_json:
        print_json(done.to_json())
    else:
        show_result(done)


def without_secrets(arguments: list[str]) -> str:
    """The command for the record: what looks like a password is not in it."""
    return " ".join(USER_OF_URL.sub("***@", SECRET.sub(r"\1***", argument)) for argument in arguments)


def show_estimate(found: Estimate) -> None:
    rows: list[tuple[str, object]] = [
        ("samples", f"{found.samples:,}"),
        ("views", f"{found.views:,}, {found.blocks:,} blocks, {found.files:,} files"),
        ("size", f"{human_bytes(found.total_bytes)}, {found.bytes_per_view:.1f} bytes a view of the teacher's"),
        ("free", human_bytes(found.free_bytes)),
        ("pace", f"{found.images_per_second:.1f} images/s on {found.device}, measured on {found.pilot_rows} views"),
        ("time", f"{human_seconds(found.seconds)}, {found.device_hours:.2f} hours of {found.device} in all"),
        ("break-even", found.break_even),
    ]
    if found.teacher_top1 is not None:
        rows.append(("teacher", f"right on {found.teacher_top1:.1%} of the pilot's views"))
    rows += [(f"codec of {name}", reason) for name, reason in found.codecs.items()]
    key_values(rows)


def show_result(done: CacheResult) -> None:
    pace = f", {done.images_per_second:.1f} images/s" if done.images_per_second else ""
    top1 = f", right on {done.teacher_top1:.1%}" if done.teacher_top1 is not None else ""
    asked = f"asked about {done.images:,} views" if done.images else "nothing was missing"
    rows: list[tuple[str, Any]] = [
        ("archive", done.path),
        ("id", done.id or f"none yet: {', '.join(done.missing) or 'another process'} is to be finished"),
        ("views", f"{done.views:,} of {done.samples:,} samples"),
        ("teacher", f"{done.teacher}, {asked}{top1}"),
        ("time", f"{human_seconds(done.seconds)}{pace}"),
        ("size", f"{human_bytes(done.total_bytes)}, {done.bytes_per_view:.1f} bytes a view of the teacher's"),
    ]
    key_values(rows)
