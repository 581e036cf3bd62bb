"""Losses on features: what a pooled layer of the student learns from one of the teacher."""

from __future__ import annotations

from redistill_cache.errors import UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.losses.checks import full_precision, reduce_rows
from redistill.specs import did_you_mean

__all__ = ["FeatureMatch"]


class FeatureMatch(nn.Module):
    """Feature distillation: the mean squared error, or 1 - cosine, between projected student and teacher features.

    mse: mean over the elements of (P f_s - f_t)²; cosine: 1 - cos(P f_s, f_t). P is linear without a bias, or the
    identity (project=none, for equal widths).
    Published (arXiv 2511.14981): mse, linear, weight 1, with a cross-entropy that trains the last layer alone.
    Needs: features; one matrix of parameters for a pair.
    """

    def __init__(self, *, student_width: int, teacher_width: int, match: str = "mse", project: str = "linear") -> None:
        super().__init__()
        if match not in ("mse", "cosine"):
            raise UsageError(f"unknown match {match!r}; {did_you_mean(match, ('mse', 'cosine'))}")
        if project not in ("linear", "none"):
            raise UsageError(f"unknown project {project!r}; {did_you_mean(project, ('linear', 'none'))}")
        if project == "none" and student_width != teacher_width:
            raise UsageError(
                f"project=none needs features of one width, found {student_width} of the student and {teacher_width} "
                "of the teacher; use project=linear"
            )
        self.match = match
        self.projector = nn.Linear(student_width, teacher_width, bias=False) if project == "linear" else None

    def forward(self, student_features: Tensor, teacher_features: Tensor, *, reduction: str = "batchmean") -> Tensor:
        projected = student_features.float()
        if self.projector is not None:
            with full_precision(projected):
                projected = self.projector(projected)
        teacher = teacher_features.detach().float()
        if self.match == "cosine":
            return reduce_rows(1 - F.cosine_similarity(projected, teacher), reduction)
        return reduce_rows((projected - teacher).square().mean(1), reduction)
