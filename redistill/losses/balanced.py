"""BD-KD: forward and reverse KL, balanced row by row by who is less certain."""

from __future__ import annotations

import torch
from torch import Tensor

from redistill.losses.checks import prepare, reduce_rows
from redistill.losses.hinton import kl_rows, log_probs
from redistill.losses.options import positive

__all__ = ["bd_kd"]


def bd_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    gain: float = 3.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Balanced divergence: T² · [w_t KL(t || s) + w_s KL(s || t)], weights per row from the entropies.

    w_t = gain where the teacher's entropy is the larger, else 1; w_s = gain where the student's is, else 1. The
    weights carry no gradient.
    Amara et al. (arXiv 2212.12965).
    A reading: the formula is taken from a re-implementation, whose code has gain 3 and whose comment says 2; T and the
    factor T² are KD's. The paper is about online distillation, where the teacher learns as well; here it is fixed.
    Needs: logits only, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    gain = positive("gain", gain)
    log_t, log_s = log_probs(teacher, temperature), log_probs(student, temperature)
    doubt_t = -(log_t.exp() * log_t).sum(1)
    doubt_s = -(log_s.exp() * log_s).sum(1).detach()
    forward = torch.where(doubt_t > doubt_s, gain, 1.0) * kl_rows(log_t, log_s)
    reverse = torch.where(doubt_s > doubt_t, gain, 1.0) * kl_rows(log_s, log_t)
    return reduce_rows(temperature**2 * (forward + reverse), reduction)
