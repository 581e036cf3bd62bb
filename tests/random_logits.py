"""Random student and teacher logits for tests of losses."""

from __future__ import annotations

import torch
from torch import Tensor


def random_logits(
    rows: int = 6, classes: int = 9, *, spread: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Student logits of deviation 1, and teacher logits of deviation `spread`."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    teacher = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread
    return student.to(dtype), teacher.to(dtype)
