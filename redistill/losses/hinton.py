"""Hinton's distillation and its closest variants.

`kd` itself; `standardize`, which can precede any loss; `bd_kd`, which adds the reverse KL; `ttm`, `wttm` and `luminet`,
which transform the teacher's or both logits first; `logit_mse` and `mld`, which compare logits without a softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import positive, prepare, reduce_rows
from redistill.losses.divergences import kl, kl_rows, log_probs

__all__ = ["bd_kd", "kd", "logit_mse", "luminet", "mld", "spread", "standardize", "ttm", "wttm"]


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

    The same function as `kl`, under the name and with the weights of the distillation literature.
    """
    return kl(student_logits, teacher_logits, temperature=temperature, reduction=reduction)


def standardize(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Logit standardisation, a transform for student and teacher rows alike: (x - mean) / (std + eps) per row.

    Sun et al., CVPR 2024 (arXiv 2403.01427); std is the sample deviation (C - 1), as in the authors' code.
    Published with KD: apply to both, then T = 2, KD weight 9 (6 to 18 by pair), CE weight 0.1.
    Needs: logits only; the result depends on neither the shift nor the scale of a row.

    A row of equal logits (an untrained, zero-initialised head) has deviation 0, and the gradient of the formula is 0/0
    or 1/eps there, either of which breaks training. Such a row gets deviation 1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    centered, length = spread(logits, -1)
    return centered / (length / math.sqrt(logits.shape[-1] - 1) + eps)


def spread(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The slices along `dim` minus their means, and the lengths of the result (dim kept).

    A slice of equal values has length 0 up to the rounding of its mean; dividing by that length would turn the
    rounding into the direction of a huge gradient. Such a slice gets length sqrt(n - 1), a deviation of 1.
    """
    count = values.shape[dim]
    centered = values - values.mean(dim, keepdim=True)
    squared = centered.square().sum(dim, keepdim=True)
    rounding = 4 * torch.finfo(values.dtype).eps * values.detach().abs().amax(dim, keepdim=True)
    return centered, torch.where(squared > count * rounding.square(), squared, max(count - 1.0, 1.0)).sqrt()


def bd_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    gain: float = 3.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Balanced divergence: T² · [w_t KL(t || s) + w_s KL(s || t)], weights per row from the entropies.

    w_t = gain if the teacher's entropy is the larger, else 1; w_s = gain if the student's is, else 1. The weights
    carry no gradient.
    Amara et al. (arXiv 2212.12965).
    Assumed: the formula is taken from a re-implementation, whose code has gain 3 and whose comment has 2; T and the
    factor T² are KD's. The paper is about online distillation, in which the teacher learns as well; here it is fixed.
    Needs: logits only, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    gain = positive("gain", gain)
    log_t, log_s = log_probs(teacher, temperature), log_probs(student, temperature)
    entropy_t = -(log_t.exp() * log_t).sum(1)
    entropy_s = -(log_s.exp() * log_s).sum(1).detach()
    forward = torch.where(entropy_t > entropy_s, gain, 1.0) * kl_rows(log_t, log_s)
    reverse = torch.where(entropy_s > entropy_t, gain, 1.0) * kl_rows(log_s, log_t)
    return reduce_rows(temperature**2 * (forward + reverse), reduction)


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

    U is 1 for a one-hot teacher and C^(1-γ) for a uniform one: uncertain teacher rows weigh more.
    Zheng and Yang, ICLR 2024 (arXiv 2402.11148).
    Published: γ between 0.1 and 0.3, with a weight per pair, CE 1.
    Needs: logits only.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    gamma = positive("gamma", gamma)
    weight = (gamma * log_probs(teacher)).logsumexp(1).exp()
    return reduce_rows(weight * kl_rows(log_probs(teacher * gamma), log_probs(student)), reduction)


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
    α² replaces KD's T².
    Hossain et al. (arXiv 2310.03669).
    Published: CIFAR T = 4 or 8, α between 33 and 75, CE 1 to 2 (2 with α = 33); ImageNet T = 0.7, α = 2; warm-up over
    20 epochs.
    Needs: batch statistics of both (in a batch of one row, value and gradient are 0).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    log_teacher = log_probs(column_scores(teacher, eps), temperature)
    log_student = log_probs(column_scores(student, eps), temperature)
    return reduce_rows(alpha**2 * kl_rows(log_teacher, log_student), reduction)


def column_scores(logits: Tensor, eps: float) -> Tensor:
    """Every class column of the batch with mean 0 and (biased) variance 1, as in batch normalisation."""
    centered = logits - logits.mean(0, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(0, keepdim=True) + eps)


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    centered: bool = False,
    reduction: str = "batchmean",
) -> Tensor:
    """Squared error of the logits: mean over the classes of (z - v)².

    Ba and Caruana, NeurIPS 2014 (arXiv 1312.6184), in the per-element mean that Kim et al., IJCAI 2021
    (arXiv 2105.08919) found to beat KL on clean teachers. Published without CE.
    centered=True removes the mean of each row from both first, so that the shift of the logits does not matter.
    Needs: logits with their shift, unless centered.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    gap = student - teacher
    if centered:
        gap = gap - gap.mean(1, keepdim=True)
    return reduce_rows(gap.square().mean(1), reduction)


def mld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Multi-label logit distillation: Σ_k KL(Bernoulli(σ(v_k)) || Bernoulli(σ(z_k))), each class on its own.

    Yang et al., ICCV 2023 (L2D, arXiv 2308.06453); T ≠ 1 divides both logits and multiplies by T², as in KD.
    Published: T = 1, weight 10. The embedding terms of the paper need features and are not implemented.
    Needs: logits with their shift (a sigmoid is not invariant to it).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    student, teacher = student / temperature, teacher / temperature
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return reduce_rows(temperature**2 * (present + absent).sum(1), reduction)
