"""Sinkhorn distillation: optimal transport between the rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from redistill.losses.checks import check_reduction, full_precision, prepare
from redistill.losses.hinton import log_probs
from redistill.losses.options import at_least_one, positive
from redistill.losses.relational import reduce_batch

__all__ = ["sinkhorn"]


def sinkhorn(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    blur: float = 0.1,
    rounds: int = 20,
    reduction: str = "batchmean",
) -> Tensor:
    """Sinkhorn distillation: Σ_ij P_ij W_ij with W_ij = ||s_i - t_j||_1 between all pairs of rows of the batch.

    P comes from exp(-W / blur) by `rounds` rounds of normalising the rows, then the columns, to sum 1; in log space,
    so that a small blur does not underflow. The gradient goes through P as well.
    Cui et al., COLING 2024 / AAAI 2025 (SinKD, arXiv 2402.17110).
    Published: T = 2, blur 0.1, 20 rounds, weight 0.001 (times 0.8), added to KL and CE.
    A reading: that rows come first in a round, and that the sum is over the whole batch, not its mean.
    Needs: batch statistics (a batch of one row: the L1 distance of the two), full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    check_reduction(reduction, per_row=False)
    temperature, blur = positive("temperature", temperature), positive("blur", blur)
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    with full_precision(student):
        cost = torch.cdist(s, t, p=1.0)
    log_plan = -cost / blur
    for _ in range(at_least_one("rounds", rounds)):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return reduce_batch((log_plan.exp() * cost).sum(), student, reduction)
