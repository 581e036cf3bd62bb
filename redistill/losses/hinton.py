"""Hinton's knowledge distillation, and the logit standardisation that can go in front of any loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import positive, prepare, reduce_rows

__all__ = ["bd_kd", "kd", "kl_rows", "log_probs", "luminet", "spread", "standardize", "ttm", "wttm"]


def log_probs(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the classes."""
    return F.log_softmax(logits / temperature, dim=-1)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of every row, from log-probabilities; a class with p = 0 adds nothing, however small q is."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Hinton's distillation term: T² · KL(softmax(v/T) || softmax(z/T)).

    Hinton, Vinyals, Dean 2015 (arXiv 1503.02531).
    Published: T = 4 and weights 0.1 CE + 0.9 KD (CIFAR); T = 1 and 0.5 + 0.5 (ImageNet).
    Needs: logits only.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    rows = kl_rows(log_probs(teacher, temperature), log_probs(student, temperature))
    return reduce_rows(temperature**2 * rows, reduction)


def standardize(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Logit standardisation, a transform for student and teacher rows alike: (x - mean) / (std + eps) per row.

    Sun et al., CVPR 2024 (arXiv 2403.01427); std is the sample deviation (C - 1), as in the authors' code.
    Published with KD: apply to both, then T = 2, KD weight 9 (6 to 18 by pair), CE weight 0.1.
    Needs: logits only; neither shift nor scale of the rows matters any more.

    A row of equal logits (an untrained, zero-initialised head) has no deviation: there the gradient of the formula
    is 0/0 or 1/eps, either of which ends a training run. Such a row counts as having deviation 1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    centered, length = spread(logits, -1)
    return centered / (length / math.sqrt(logits.shape[-1] - 1) + eps)


def spread(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The slices along `dim` minus their means, and the lengths of that (dim kept).

    A slice of equal values has length 0 but for the rounding of its mean; what divides by the length would turn that
    rounding into the direction of a huge gradient. Such a slice gets length sqrt(n - 1), a deviation of 1.
    """
    count = values.shape[dim]
    centered = values - values.mean(dim, keepdim=True)
    squared = centered.square().sum(dim, keepdim=True)
    rounding = 4 * torch.finfo(values.dtype).eps * values.detach().abs().amax(dim, keepdim=True)
    return centered, torch.where(squared > count * rounding.square(), squared, max(count - 1.0, 1.0)).sqrt()


# -- balanced ---------------------------------------------------------------------------------------------------------
#
# BD-KD: forward and reverse KL, balanced row by row by who is less certain.


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


# -- transformed ------------------------------------------------------------------------------------------------------
#
# KD after a transform of the teacher or of both: TTM and WTTM (a power of the teacher), LumiNet (column z-scores).


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
