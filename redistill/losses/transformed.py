"""KD after a transform of the teacher or of both: TTM and WTTM (a power of the teacher), LumiNet (column z-scores)."""

from __future__ import annotations

import torch
from torch import Tensor

from redistill.losses.checks import prepare, reduce_rows
from redistill.losses.hinton import kl_rows, log_probs
from redistill.losses.options import positive

__all__ = ["luminet", "ttm", "wttm"]


def ttm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    gamma: float = 0.1,
    reduction: str = "batchmean",
) -> Tensor:
    """Transformed teacher matching: KL(p̃ || s), p̃ = t^γ / Σ t^γ, with t and the student s at T = 1.

    KD with the temperature (1/γ) on the teacher's side only; no T² factor.
    Zheng and Yang, ICLR 2024 (arXiv 2402.11148).
    Published: γ between 0.1 and 0.3, with a weight per pair (VGG13-8: γ = 0.1, weight 45), CE 1.
    Needs: logits only.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    gamma = positive("gamma", gamma)
    return reduce_rows(kl_rows(log_probs(teacher * gamma), log_probs(student)), reduction)


def wttm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    gamma: float = 0.1,
    reduction: str = "batchmean",
) -> Tensor:
    """Weighted transformed teacher matching: U · KL(p̃ || s), U = Σ_k t_k^γ, p̃ = t^γ / U, t and s at T = 1.

    U is 1 for a one-hot teacher and C^(1-γ) for a uniform one: unsure teacher rows weigh more.
    Zheng and Yang, ICLR 2024 (arXiv 2402.11148).
    Published: γ between 0.1 and 0.3, with a weight per pair, CE 1.
    Needs: logits only.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    gamma = positive("gamma", gamma)
    weight = (gamma * log_probs(teacher)).logsumexp(1).exp()
    return reduce_rows(weight * kl_rows(log_probs(teacher * gamma), log_probs(student)), reduction)


def column_scores(logits: Tensor, eps: float) -> Tensor:
    """Every class column of the batch to mean 0 and (biased) variance 1, as batch normalisation does."""
    centered = logits - logits.mean(0, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(0, keepdim=True) + eps)


def luminet(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 33.0,
    eps: float = 1e-5,
    reduction: str = "batchmean",
) -> Tensor:
    """LumiNet: α² · KL(softmax(h(v)/T) || softmax(h(z)/T)), h = z-score of each class column over the batch.

    h(x)_c = (x_c - μ_c) / sqrt(var_c + 1e-5), with the batch's own statistics, of student and teacher separately;
    α² stands where KD has T².
    Hossain et al. (arXiv 2310.03669).
    Published: CIFAR T = 4 or 8, α between 33 and 75, CE 1 to 2; ImageNet T = 0.7, α = 2; warm-up over 20 epochs.
    Needs: batch statistics of both (a batch of one row says nothing: value and gradient are 0).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    log_teacher = log_probs(column_scores(teacher, eps), temperature)
    log_student = log_probs(column_scores(student, eps), temperature)
    return reduce_rows(alpha**2 * kl_rows(log_teacher, log_student), reduction)
