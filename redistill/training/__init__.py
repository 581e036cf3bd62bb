"""Stage 2: train students from an archive, without a teacher in memory."""

from __future__ import annotations

from redistill.training.loop import train
from redistill.training.options import TrainOptions
from redistill.training.run_files import TrainResult

__all__ = ["TrainOptions", "TrainResult", "train"]
