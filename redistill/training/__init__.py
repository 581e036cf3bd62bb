"""Stage 2: train students from an archive, without a teacher in memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from redistill.training.options import TrainOptions

if TYPE_CHECKING:
    from redistill.training.first_step import DryRun, dry_run
    from redistill.training.loop import train
    from redistill.training.run_files import TrainResult

__all__ = ["DryRun", "TrainOptions", "TrainResult", "dry_run", "train"]

LAZY = {
    "DryRun": "redistill.training.first_step",
    "TrainResult": "redistill.training.run_files",
    "dry_run": "redistill.training.first_step",
    "train": "redistill.training.loop",
}


def __getattr__(name: str) -> object:
    """Names that need torch are loaded at first use: `redistill --help` reads the options only."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)
