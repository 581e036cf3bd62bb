"""Controls: losses with no teacher in them, to see how much of a gain is only regularisation."""

from __future__ import annotations

import math

import torch
from redistill_cache.errors import UsageError
from torch import Tensor

from redistill.losses.checks import check_labels, prepare, reduce_rows
from redistill.losses.hinton import kl_rows, log_probs
from redistill.losses.options import fraction, positive

__all__ = ["label_smoothing", "virtual_teacher"]


def label_smoothing(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    smoothing: float = 0.1,
    reduction: str = "batchmean",
) -> Tensor:
    """Label smoothing: -(1 - ε) log s_y - ε mean_k log s_k. The teacher is checked for its shape and not used.

    Szegedy et al., CVPR 2016 (arXiv 1512.00567). Published: ε = 0.1. It contains the hard-label term: CE weight 0.
    Needs: labels.
    """
    student, _ = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    smoothing = fraction("smoothing", smoothing)
    log_s = log_probs(student)
    hard = -log_s.gather(1, labels[:, None])[:, 0]
    return reduce_rows((1 - smoothing) * hard - smoothing * log_s.mean(1), reduction)


def virtual_teacher(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    confidence: float = 0.99,
    temperature: float = 20.0,
    reduction: str = "batchmean",
) -> Tensor:
    """KD from a hand-made teacher that is always right: T² · KL(p_T || softmax(z/T)), p_y = a, p_k = (1 - a)/(C - 1).

    p_T is p softened to temperature T, that is softmax(log p / T). confidence = a = 1/C is the uniform teacher.
    Yuan et al., CVPR 2020 (Tf-KD_reg, arXiv 1909.11723). The real teacher is checked for its shape and not used.
    A reading: a = 0.99 and T = 20 are recalled from the authors' code, which also differs in detail (it softens by
    softmax(p / T), and leaves the student at T = 1); this is the formula of the paper.
    Needs: labels.
    """
    student, _ = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must be between 0 and 1, both excluded, found {confidence}")
    temperature = positive("temperature", temperature)
    others = math.log((1 - confidence) / (student.shape[1] - 1))
    made = torch.full_like(student, others).scatter(1, labels[:, None], math.log(confidence))
    rows = kl_rows(log_probs(made, temperature), log_probs(student, temperature))
    return reduce_rows(temperature**2 * rows, reduction)
