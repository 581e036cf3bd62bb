"""`redistill train`: stage 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from redistill_cache.addresses import split_pin, with_pin
from redistill_cache.errors import RedistillError, UsageError
from redistill_cache.wording import harmless, human_bytes
from rich.table import Table

from redistill.optim import PRESETS
from redistill.option_fields import options_of, shown
from redistill.training.options import CONFIG, TrainOptions, locations, read_config
from redistill_cli.options import collect, takes
from redistill_cli.rendering import (
    Offline,
    TerminalProgress,
    console,
    human_seconds,
    key_values,
    local_archive,
    print_json,
    set_offline,
    streamed_archive,
)

if TYPE_CHECKING:
    from redistill_cache import Archive

    from redistill.training import DryRun, TrainResult


@takes(TrainOptions, require=False)
def train(
    *,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Take the settings of a run from its config.toml, without its paths."),
    ] = None,
    trust_config: Annotated[
        bool, typer.Option("--trust-config", help="Take the paths and addresses in --config as well, except --out.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="|".join(PRESETS), help="Settings of a recipe, used where no option is set."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything and do one step; print steps, memory and disk; write nothing to --out."
        ),
    ] = False,
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    **values: object,
) -> None:
    """Train students from an archive, without the teacher.

    Run the same command again to resume after an interruption; on a CPU the
    resumed run is bit-exact. Several --student, --loss or --seed are trained
    in one pass over the images. Under torchrun the ranks share every batch.

    A finished run goes on if --epochs is raised, where the learning rate
    does not depend on the number of epochs (--sched constant, step or
    multistep).

    Options come from the command line, then --config, then --preset.

    Examples:

    \b
      redistill train cifar100:data --archive r32x4.redistill.zarr \\
        --student cifar:resnet8x4 --preset cifar-kd \\
        --val 'cifar100:data?split=val' --out runs/r8x4

    \b
      redistill train folder:imagenet/train --epochs 100 \\
        --archive resnet50.redistill.zarr --student torchvision:resnet18 \\
        --loss power --loss kl --loss ce --seed 0 --seed 1 \\
        --out runs/losses

    \b
      torchrun --nproc-per-node=8 -m redistill_cli train \\
        --config runs/losses/power-0/config.toml --trust-config \\
        --out runs/again
    """
    set_offline(offline)
    # Before torch is imported, which takes seconds.
    options, archive = read_options(collect(TrainOptions, values), config, preset, trust_config=trust_config)
    from redistill.ranks import Rank
    from redistill.training import dry_run as run_one_step
    from redistill.training import train as run

    with TerminalProgress() as progress:
        if dry_run:
            needs = run_one_step(options, progress, archive=archive)
            if Rank.from_environment().first:
                print_json(needs.to_json()) if as_json else show_dry_run(needs)
            return
        results = run(options, progress, archive=archive)
    if Rank.from_environment().first:
        show(results, as_json=as_json)
        write_run_report(options)


def read_options(
    values: Mapping[str, Any], config: Path | None, preset: str | None, *, trust_config: bool = False
) -> tuple[TrainOptions, Archive | None]:
    """The options, and the archive where it is at an address: its views are fetched while it is used."""
    merged = {**({} if config is None else settings_of(config, values, trust=trust_config)), **values}
    required = [option for option in options_of(TrainOptions).values() if option.default is MISSING]
    missing = [option.flag for option in required if option.field not in merged]
    if missing:
        raise UsageError(f"train needs {', '.join(missing)}; see redistill train --help")
    merged["allow_python"] = config is None
    TrainOptions.read(merged, preset_name=preset)  # every option is checked before an archive is fetched
    pins = recorded_pins(Path(merged["out"]))
    archive = None
    for name in ("archive", "val_archive"):
        if name in merged:
            location, pin = split_pin(str(merged[name]))
            pinned = with_pin(location, pin or pins.get(name))
            streamed = streamed_archive(pinned) if name == "archive" else None
            archive = archive or streamed
            path = local_archive(pinned) if streamed is None else streamed.path
            merged[name] = with_pin(str(path), split_pin(pinned)[1])
    return TrainOptions.read(merged, preset_name=preset), archive


def settings_of(config: Path, values: Mapping[str, Any], *, trust: bool) -> dict[str, Any]:
    """The options of a file that may be a stranger's: what it chooses to read must be repeated, or be trusted."""
    stored = read_config(config)
    stored.pop("out", None)
    chosen = [name for name in locations(stored) if name not in values]
    if chosen and not trust:
        flags = ", ".join(f"{options_of(TrainOptions)[name].flag} {shown(stored[name])}" for name in chosen)
        raise UsageError(f"{config} names {flags}: repeat it on the command line, or add --trust-config")
    return stored


def show_dry_run(needs: DryRun) -> None:
    rows_at = "a temporary file" if needs.teacher_rows_on_disk else "memory"
    rows: list[tuple[str, object]] = [
        ("steps", f"{needs.steps:,}: {needs.epochs} epochs of {needs.steps_per_epoch:,} with {needs.images:,} images"),
        ("validation", "none" if needs.validation_images is None else f"{needs.validation_images:,} images"),
        ("first step", f"{human_seconds(needs.step_seconds)} on {needs.device}, with the start of the workers"),
        ("memory", f"{human_bytes(needs.peak_memory_bytes)} at most so far"),
        ("teacher rows", f"{human_bytes(needs.teacher_rows_bytes)} in {rows_at}"),
        ("disk", f"{human_bytes(needs.disk_bytes)} for checkpoints and weights, {human_bytes(needs.free_bytes)} free"),
    ]
    rows += [
        (name, f"{needs.parameters[name]:,} parameters, loss {loss:.3f} before the first step")
        for name, loss in needs.losses.items()
    ]
    if needs.resumes:
        rows.append(("--out", "holds a run, which would be resumed"))
    key_values(rows)


def recorded_pins(out: Path) -> dict[str, str]:
    """The ids to which the archives of an earlier run in this folder are pinned: resuming it repeats them."""
    config = next((path for path in (out / CONFIG, *sorted(out.glob(f"*/{CONFIG}"))) if path.is_file()), None)
    options = {} if config is None else read_config(config)
    pins = {name: split_pin(str(options.get(name, "")))[1] for name in ("archive", "val_archive")}
    return {name: pin for name, pin in pins.items() if pin is not None}


def show(results: Sequence[TrainResult], *, as_json: bool) -> None:
    if as_json:
        documents = [result.to_json() for result in results]
        print_json(documents[0] if len(documents) == 1 else {"runs": documents})
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("run", "top-1", "top-5", "NLL", "ECE", "agreement", "best", "images/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for result in results:
        table.add_row(
            harmless(result.run),
            percent(result.top1),
            percent(result.top5),
            decimals(result.nll),
            decimals(result.ece),
            percent(result.agreement),
            percent(result.best_top1),
            f"{result.images_per_second:.0f}",
        )
    console.print(table)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_run_report(options: TrainOptions) -> None:
    """Write report.html beside the runs. The runs are finished, so an error is only a warning."""
    from redistill.report import write_report

    page = options.out / "report.html"
    try:
        write_report([options.folder(member) for member in options.members], page, archive=options.archive)
    except Exception as error:  # noqa: BLE001  a bug in the report must not fail a finished training
        reason = error if isinstance(error, RedistillError) else repr(error)
        typer.echo(f"warning: training is finished, but {harmless(page)} was not written: {harmless(reason)}", err=True)
    else:
        typer.echo(f"report: {harmless(page)}", err=True)
