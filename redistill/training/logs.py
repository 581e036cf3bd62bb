"""Figures of every epoch, for people and their tools: metrics.csv, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from redistill_cache.errors import UsageError
from redistill_cache.files import LOCAL

__all__ = ["Logs", "open_logs"]

Row = Mapping[str, Any]


class Log(Protocol):
    def epoch(self, row: Row, history: Sequence[Row]) -> None: ...
    def close(self) -> None: ...


class CsvLog:
    """metrics.csv, written anew from the whole history every epoch: a resumed run leaves no line twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        del row
        columns = list(dict.fromkeys(name for line in history for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        LOCAL.publish(self.path, text.getvalue().encode())

    def close(self) -> None: ...


class TensorBoardLog:
    def __init__(self, folder: Path, first_epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "--log tensorboard needs an extra: pip install 'redistill[tensorboard]', or --log csv"
            ) from None
        # What an interrupted run wrote beyond the place it goes on from is dropped by TensorBoard.
        self.writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        del history
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLog:
    def __init__(self, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError("--log wandb needs an extra: pip install 'redistill[wandb]'") from None
        kept = folder / "wandb-id.txt"  # a run that goes on is the same run there
        if not kept.exists():
            LOCAL.publish(kept, uuid.uuid4().hex.encode())
        self.run = wandb.init(project="redistill", name=name, dir=str(folder), id=kept.read_text(), resume="allow")

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        del history
        self.run.log(dict(row), step=row["epoch"])

    def close(self) -> None:
        self.run.finish()


class Logs:
    """Every log of one run."""

    def __init__(self, logs: Sequence[Log]) -> None:
        self.logs = logs

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        """`row` is the last of `history`."""
        for log in self.logs:
            log.epoch(row, history)

    def close(self) -> None:
        for log in self.logs:
            log.close()


def open_logs(folder: Path, kinds: Sequence[str], *, first_epoch: int = 0) -> Logs:
    """The logs of a run that goes on with `first_epoch`."""
    logs: list[Log] = []
    for kind in kinds:
        if kind == "csv":
            logs.append(CsvLog(folder))
        elif kind == "tensorboard":
            logs.append(TensorBoardLog(folder, first_epoch))
        else:
            logs.append(WandbLog(folder, folder.name))
    return Logs(logs)
