"""Losses that correct the target with the label: swap (LA), label revision (LR), RC."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import check_labels, fraction, positive, prepare, reduce_rows
from redistill.losses.divergences import kl_rows, log_probs

__all__ = ["label_revision", "rc", "swap", "swap_kd"]


def swap(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits with the values of the highest and the true class exchanged; correctly predicted rows do not change."""
    best = logits.argmax(1, keepdim=True)
    true = labels[:, None]
    highest, of_true = logits.gather(1, best), logits.gather(1, true)
    return logits.scatter(1, best, of_true).scatter(1, true, highest)


def swap_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Logit adjustment by swapping (LA): KD, after exchanging the teacher's top logit and its true-class logit.

    Wen et al., Neurocomputing 2021 ("Preparing lessons", arXiv 1911.07471), as the baseline of RLD.
    Published without CE.
    Needs: labels, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature = positive("temperature", temperature)
    rows = kl_rows(log_probs(swap(teacher, labels), temperature), log_probs(student, temperature))
    return reduce_rows(temperature**2 * rows, reduction)


def label_revision(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    eta: float = 0.8,
    right: float = 4.0,
    wrong: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Label revision (LR): CE(y, s) + λ1 mean_k (z - v)² for rows where the teacher is right, λ2 mean_k (s - r)² where
    it is wrong, with the revised target r = β t + (1 - β) y, β = η / (max t - t_y + 1), s, t = softmax at T = 1.

    The loss of a batch is the mean of the right rows plus the mean of the wrong rows, so that a few wrong rows pull as
    much as many right ones; the value of a row is its share of that, times the number of rows. β is the largest share
    of the teacher for which y is still the highest class of r. The loss contains the hard-label term (only on rows
    where the teacher is right): use it with CE weight 0.
    Lan et al. 2024 ("Improve KD via label revision and data selection", arXiv 2404.03693), as in the code of RLD, the
    only one that is public.
    Published there: η = 0.8, λ1 = `right` = 4, λ2 = `wrong` = 1.
    Needs: labels, full rows, logits with their shift, batch statistics (the sizes of the two groups).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    eta = fraction("eta", eta)
    s, t = log_probs(student).exp(), log_probs(teacher).exp()
    best = teacher.argmax(1)
    teacher_share = eta / (t.amax(1) - t.gather(1, labels[:, None])[:, 0] + 1)
    revised = teacher_share[:, None] * t + (1 - teacher_share)[:, None] * F.one_hot(labels, t.shape[1])
    right_rows = F.cross_entropy(student, labels, reduction="none") + right * (student - teacher).square().mean(1)
    wrong_rows = wrong * (s - revised).square().mean(1)
    is_right = best == labels
    rows_of_group = torch.where(is_right, is_right.sum(), (~is_right).sum())
    rows = torch.where(is_right, right_rows, wrong_rows) * (len(labels) / rows_of_group)
    return reduce_rows(rows, reduction)


def rc(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    own_weight: float = 0.1,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """RC: KD + w T² KL(r || s), r = softmax(z' / T), z' = the student's own logits with max_k z added to z_y.

    Moves the student towards the label and keeps its own relations between the other classes; z' carries no gradient.
    Published (as in RLD's code): w = `own_weight` = 0.1, T = 4, CE 1. Where max z < 0 the formula lowers z_y.
    Needs: labels; the shift of the student's logits matters.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature = positive("temperature", temperature)
    log_s = log_probs(student, temperature)
    own = student.detach()
    raised = own.scatter_add(1, labels[:, None], own.amax(1, keepdim=True))
    rows = kl_rows(log_probs(teacher, temperature), log_s) + own_weight * kl_rows(log_probs(raised, temperature), log_s)
    return reduce_rows(temperature**2 * rows, reduction)
