"""`redistill train`: stage 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from redistill_cache.addresses import split_pin, with_pin
from redistill_cache.errors import RedistillError, UsageError
from redistill_cache.wording import harmless
from rich.table import Table

from redistill.optim import PRESETS
from redistill.option_fields import options_of
from redistill.training.options import CONFIG, TrainOptions, read_config
from redistill_cli.options import collect, takes
from redistill_cli.rendering import Offline, TerminalProgress, console, local_archive, print_json, set_offline

if TYPE_CHECKING:
    from redistill.training import TrainResult


@takes(TrainOptions, require=False)
def train(
    *,
    config: Annotated[Path | None, typer.Option("--config", help="Repeat a run from its config.toml.")] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="|".join(PRESETS), help="Settings of a recipe, used where no option is set."),
    ] = None,
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    **values: object,
) -> None:
    """Train students from an archive, without the teacher.

    Run the same command again to resume after an interruption; on a CPU the
    resumed run is bit-exact. Several --student, --loss or --seed are trained
    in one pass over the images. Under torchrun the ranks share every batch.

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
        --config runs/losses/power-0/config.toml --out runs/again
    """
    from redistill.ranks import Rank
    from redistill.training import train as run

    set_offline(offline)
    options = read_options(collect(TrainOptions, values), config, preset)
    with TerminalProgress() as progress:
        results = run(options, progress)
    if Rank.from_environment().first:
        show(results, as_json=as_json)
        write_run_report(options)


def read_options(values: Mapping[str, Any], config: Path | None, preset: str | None) -> TrainOptions:
    merged = {**({} if config is None else read_config(config)), **values}
    required = [option for option in options_of(TrainOptions).values() if option.default is MISSING]
    missing = [option.flag for option in required if option.field not in merged]
    if missing:
        raise UsageError(f"train needs {', '.join(missing)} (or --config RUN/config.toml); see redistill train --help")
    pins = recorded_pins(Path(merged["out"]))
    for name in ("archive", "val_archive"):
        if name in merged:
            location, pin = split_pin(str(merged[name]))
            pinned = with_pin(location, pin or pins.get(name))
            merged[name] = with_pin(str(local_archive(pinned)), split_pin(pinned)[1])
    return TrainOptions.read(merged | {"allow_python": config is None}, preset_name=preset)


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
