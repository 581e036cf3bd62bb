"""`redistill train`: stage 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from redistill_cache.wording import harmless
from rich.table import Table

from redistill_cli.rendering import PLACE, TerminalProgress, archive_at, console, print_json

if TYPE_CHECKING:
    from redistill.training import TrainOptions, TrainResult


def train(
    data: Annotated[
        str | None, typer.Argument(help="The images the archive was made from: folder:PATH, cifar100:PATH, ...")
    ] = None,
    archive: Annotated[str | None, typer.Option("--archive", metavar=PLACE, help="What cache-teacher wrote.")] = None,
    student: Annotated[
        list[str] | None,
        typer.Option("--student", help="torchvision:resnet18, cifar:resnet8x4, ...; several: a cohort."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder of the run; a cohort makes one in it each.")
    ] = None,
    val: Annotated[str | None, typer.Option("--val", help="Held-out images, validated on after every epoch.")] = None,
    val_archive: Annotated[
        str | None,
        typer.Option(
            "--val-archive",
            metavar=PLACE,
            help="The teacher over --val: agreement and KL on held-out views.",
        ),
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            "--loss", help="Terms joined by '+'; several: a cohort. [default: power?lam=0.6667&temperature=4]"
        ),
    ] = None,
    ce_weight: Annotated[
        float | None, typer.Option("--ce-weight", help="Weight of the labels. [default: published]")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Of weights and noise; several: a cohort. [default: 0]")
    ] = None,
    cohort: Annotated[Path | None, typer.Option("--cohort", help="TOML with lists students, losses, seeds.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Repeat a run from its config.toml.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="cifar-kd, imagenet-100 or quick.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Over all processes. [default: 128]")] = None,
    opt: Annotated[str | None, typer.Option("--opt", help="sgd, nesterov, adam or adamw.")] = None,
    lr: Annotated[float | None, typer.Option("--lr")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay")] = None,
    momentum: Annotated[float | None, typer.Option("--momentum")] = None,
    sched: Annotated[str | None, typer.Option("--sched", help="cosine, step, multistep or constant.")] = None,
    warmup_epochs: Annotated[float | None, typer.Option("--warmup-epochs")] = None,
    warmup_lr: Annotated[float | None, typer.Option("--warmup-lr")] = None,
    min_lr: Annotated[float | None, typer.Option("--min-lr")] = None,
    decay_epochs: Annotated[float | None, typer.Option("--decay-epochs", help="For --sched step.")] = None,
    decay_milestones: Annotated[
        str | None, typer.Option("--decay-milestones", help="For --sched multistep: 150,180,210.")
    ] = None,
    decay_rate: Annotated[float | None, typer.Option("--decay-rate")] = None,
    clip_grad: Annotated[float | None, typer.Option("--clip-grad", help="Largest norm of the gradient.")] = None,
    no_decay_norm_bias: Annotated[
        bool | None, typer.Option("--no-decay-norm-bias", help="Spare norms and biases weight decay.")
    ] = None,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="[default: on CUDA only]")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile", help="torch.compile the students.")] = None,
    channels_last: Annotated[bool | None, typer.Option("--channels-last/--no-channels-last")] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", help="Decay of an average of the weights, such as 0.999.")
    ] = None,
    grad_accum: Annotated[int | None, typer.Option("--grad-accum", help="Parts of a batch, one after another.")] = None,
    sync_bn: Annotated[bool | None, typer.Option("--sync-bn", help="Batch norms over all GPUs.")] = None,
    views_per_image: Annotated[
        int | None, typer.Option("--views-per-image", help="Views of an image in one batch, decoded once.")
    ] = None,
    teacher_names: Annotated[
        str | None,
        typer.Option("--teacher-names", help="Of the archive, a,b: the mean of their logits. [default: all]"),
    ] = None,
    online_teacher: Annotated[
        str | None, typer.Option("--online-teacher", help="The baseline: a teacher that runs beside the students.")
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Side of the views. [default: the teacher's]")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Rendering processes. [default: cores]")] = None,
    cache_memory: Annotated[
        float | None, typer.Option("--cache-memory", help="GiB for the teacher's rows; above it, a temporary file.")
    ] = None,
    allow_missing: Annotated[
        bool | None, typer.Option("--allow-missing", help="Train on the images that match.")
    ] = None,
    order_seed: Annotated[int | None, typer.Option("--order-seed", help="Decides the order of images.")] = None,
    checkpoint_minutes: Annotated[float | None, typer.Option("--checkpoint-minutes", help="[default: 10]")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="auto or never. [default: auto]")] = None,
    log: Annotated[str | None, typer.Option("--log", help="csv,tensorboard,wandb. [default: csv,tensorboard]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train students from an archive: the teacher's answers for exactly the views it saw, and no teacher.

    The same command goes on after any interruption, to the very same weights on a CPU. Under torchrun the processes
    share every batch. Several --student, --loss or --seed are trained in one pass over the images.

    Examples:

      redistill train cifar100:data --archive r32x4.redistill.zarr --student cifar:resnet8x4 --preset cifar-kd
      --val 'cifar100:data?split=val' --out runs/r8x4

      redistill train folder:imagenet/train --archive resnet50.redistill.zarr --student torchvision:resnet18
      --loss power --loss kl --loss ce --seed 0 --seed 1 --epochs 100 --out runs/losses

      torchrun --nproc-per-node=8 -m redistill_cli train ...
    """
    from redistill.ranks import Rank
    from redistill.training import TrainOptions
    from redistill.training import train as run
    from redistill.training.options import read_config

    given = {
        "data": data,
        "archive": archive,
        "students": student,
        "out": out,
        "val": val,
        "val_archive": val_archive,
        "losses": loss,
        "ce_weight": ce_weight,
        "seeds": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "opt": opt,
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "sched": sched,
        "warmup_epochs": warmup_epochs,
        "warmup_lr": warmup_lr,
        "min_lr": min_lr,
        "decay_epochs": decay_epochs,
        "decay_milestones": None if decay_milestones is None else numbers("--decay-milestones", decay_milestones),
        "decay_rate": decay_rate,
        "clip_grad": clip_grad,
        "no_decay_norm_bias": no_decay_norm_bias,
        "amp": amp,
        "compile": compile_,
        "channels_last": channels_last,
        "ema": ema,
        "grad_accum": grad_accum,
        "sync_bn": sync_bn,
        "views_per_image": views_per_image,
        "teachers": split(teacher_names),
        "online_teacher": online_teacher,
        "size": size,
        "device": device,
        "workers": workers,
        "cache_memory": cache_memory,
        "allow_missing": allow_missing,
        "order_seed": order_seed,
        "checkpoint_minutes": checkpoint_minutes,
        "resume": resume,
        "log": split(log),
    }
    said = {name: value for name, value in given.items() if value not in (None, [])}
    if config is not None:
        said = {**read_config(config), **said}
    if cohort is not None:
        said |= read_cohort(cohort)
    refuse_unsaid(said)
    for name in ("archive", "val_archive"):
        if name in said:
            said[name] = archive_at(str(said[name]))
    options = TrainOptions.read(said | {"allow_python": config is None}, preset_name=preset)
    with TerminalProgress() as progress:
        outcomes = run(options, progress)
    if Rank.from_environment().first:
        show(outcomes, as_json=as_json)
        leave_report(options)


def split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str) -> list[float]:
    from redistill_cache.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes numbers with commas between, found {text!r}") from None


def read_cohort(path: Path) -> dict[str, Any]:
    """Lists that make a cohort, from a TOML file."""
    import tomllib

    from redistill_cache.errors import UsageError

    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--cohort {path} cannot be read: {error}") from None
    known = {"students", "losses", "seeds"}
    if not found or set(found) - known or not all(isinstance(value, list) for value in found.values()):
        raise UsageError(f"--cohort {path}: expected lists named students, losses or seeds, found {sorted(found)}")
    return found


def refuse_unsaid(said: Mapping[str, Any]) -> None:
    from redistill_cache.errors import UsageError

    options = {"data": "DATA", "archive": "--archive", "students": "--student", "out": "--out"}
    unsaid = [option for name, option in options.items() if name not in said]
    if unsaid:
        raise UsageError(f"train needs {', '.join(unsaid)} (or --config RUN/config.toml); see redistill train --help")


def show(outcomes: Sequence[TrainResult], *, as_json: bool) -> None:
    if as_json:
        found = [outcome.to_json() for outcome in outcomes]
        print_json(found[0] if len(found) == 1 else {"runs": found})
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("run", "top-1", "top-5", "NLL", "ECE", "agreement", "best", "images/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for outcome in outcomes:
        shares = [percent(outcome.top1), percent(outcome.top5)]
        plain = ["-" if value is None else f"{value:.3f}" for value in (outcome.nll, outcome.ece)]
        rest = [percent(outcome.agreement), percent(outcome.best_top1), f"{outcome.images_per_second:.0f}"]
        table.add_row(harmless(outcome.run), *shares, *plain, *rest)
    console.print(table)


def leave_report(options: TrainOptions) -> None:
    """The page about these runs, beside them. They are finished, whatever becomes of it."""
    from redistill_cache.errors import RedistillError

    from redistill.report import write_report

    page = options.out / "report.html"
    try:
        write_report([options.folder(member) for member in options.members()], page, archive=options.archive)
    except Exception as error:  # noqa: BLE001  even a fault of the page takes nothing from the runs
        why = error if isinstance(error, RedistillError) else repr(error)
        typer.echo(
            f"warning: the training is finished, but {harmless(page)} was not written: {harmless(why)}", err=True
        )
    else:
        typer.echo(f"report: {harmless(page)}", err=True)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
