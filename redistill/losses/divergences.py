"""The divergences of the literature that are not a member of the power family, and those that are under another name.

Everywhere p = softmax(teacher/T), q = softmax(student/T); the teacher is a constant; times T² where `scale_by_t2`.
"""

from __future__ import annotations

import math

import torch
from redistill_cache.errors import UsageError
from torch import Tensor

from redistill.losses.checks import check_reduction, positive, prepare, reduce_rows
from redistill.losses.power import LARGEST_EXPONENT, power_divergence

__all__ = [
    "alpha_beta",
    "hellinger",
    "jensen_shannon",
    "kl",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(p || q) = Σ p log(p/q), the member lam = 0 of the power divergence. Unbounded. Needs logits only.

    Kullback, Leibler 1951; as a distillation loss Hinton et al. 2015. Defaults: T = 4, times T².
    """
    return power_divergence(
        student_logits, teacher_logits, 0.0, temperature, reduction=reduction, scale_by_t2=scale_by_t2
    )


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(q || p) = Σ q log(q/p), the member lam = 1 of the bounded form; mode seeking. Unbounded. Needs logits only.

    MiniLLM (arXiv 2306.08543) for language models, here without its sampling. Defaults: T = 4, times T².
    """
    return power_divergence(
        student_logits, teacher_logits, 1.0, temperature, reduction=reduction, scale_by_t2=scale_by_t2
    )


def hellinger(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """4 (1 - Σ √(pq)), four times the squared Hellinger distance: the member lam = 1/2. At most 4. Needs logits only.

    Beran 1977 for its robustness. The factor 4 makes it agree with KL to second order, so weights carry over.
    Defaults: T = 4, times T².
    """
    return power_divergence(
        student_logits, teacher_logits, 0.5, temperature, reduction=reduction, scale_by_t2=scale_by_t2
    )


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """β KL(p || m) + (1-β) KL(q || m), m = βp + (1-β)q. Bounded by the entropy of (β, 1-β). Needs logits only.

    GKD (arXiv 2306.13649) without its on-policy part; β = 1/2 is half the symmetric Jensen-Shannon sum. As published it
    vanishes with β -> 0 (like β·KL) and β -> 1 (like (1-β)·reverse KL), so both ends are refused.
    Defaults: β = 0.5, T = 1.
    """
    if not 0.0 < beta < 1.0:
        raise UsageError(f"beta must lie strictly between 0 and 1, found {beta}; the ends are kl and reverse_kl")
    log_p, log_q, scale = _log_probabilities(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    log_m = _log_mixture(log_p, log_q, beta)
    rows = beta * _kl_rows(log_p, log_m) + (1.0 - beta) * _kl_rows(log_q, log_m)
    return reduce_rows(scale * rows, reduction)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(p || αp + (1-α)q); α = 0 is KL; bounded by log(1/α). Needs logits only.

    DistiLLM (arXiv 2402.03898): skewing bounds the gradient. Defaults: α = 0.1, T = 1.
    """
    _check_skew(alpha)
    log_p, log_q, scale = _log_probabilities(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    return reduce_rows(scale * _kl_rows(log_p, _log_mixture(log_p, log_q, alpha)), reduction)


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(q || (1-α)p + αq); α = 0 is reverse KL; bounded by log(1/α). Needs logits only.

    DistiLLM (arXiv 2402.03898). Defaults: α = 0.1, T = 1.
    """
    _check_skew(alpha)
    log_p, log_q, scale = _log_probabilities(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    return reduce_rows(scale * _kl_rows(log_q, _log_mixture(log_p, log_q, 1.0 - alpha)), reduction)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """½ Σ |p - q|, at most 1; its gradient has the same size however small the difference is. Needs logits only.

    f-distill (arXiv 2307.15190). Defaults: T = 1.
    """
    log_p, log_q, scale = _log_probabilities(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    return reduce_rows((0.5 * scale) * (log_p.exp() - log_q.exp()).abs().sum(dim=1), reduction)


def alpha_beta(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.8,
    beta: float = 0.3,
    temperature: float = 4.0,
    scale_by_t2: bool = False,
    reduction: str = "batchmean",
) -> Tensor:
    """ABKD: -1/(αβ) Σ [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)], with its limits. Needs logits only.

    ABKD (arXiv 2505.04560) on the divergence of Cichocki et al. 2011. (1, 0) is KL, (0, 1) reverse KL, (1/2, 1/2)
    `hellinger`, (1, 1) half the squared distance, (1+k, -k) the power divergence in Cressie-Read's sign. Small α
    shrinks what a wrong teacher can do, large β follows the confidence of the student. Bounded for α, β > 0.

    The limits carry 1/α² and 1/β² (and are smooth: a neighbour of a limit agrees with it); the authors' code has
    1/α and 1/β, which is another loss unless |α| = 1. Exponents above 60 (α or β < 0, extreme logits) are held there.
    Defaults, as published for CIFAR-100: α = 0.8, β = 0.3, T = 4, no T² factor (their weight, 32, is 2 T²), CE 1.
    """
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise UsageError(f"alpha and beta must be finite numbers, found {alpha} and {beta}")
    log_p, log_q, scale = _log_probabilities(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    # The divergence is symmetric under p <-> q with α <-> β; dividing by the larger of the two keeps its digits.
    if abs(alpha) > abs(beta):
        rows = _alpha_beta_rows(log_q, log_p, beta, alpha)
    else:
        rows = _alpha_beta_rows(log_p, log_q, alpha, beta)
    return reduce_rows(scale * rows, reduction)


def _alpha_beta_rows(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Σ q^σ [f_σ(r) - f_α(r)] / β with σ = α + β, r = log(p/q), f_c(r) = expm1(cr)/c: no singularity but β = 0."""
    log_ratio = log_p - log_q
    if abs(beta) < 1e-6:
        return 0.5 * log_ratio.square().sum(dim=1)
    if abs(beta) < 0.05:
        # Both are nearly 0: the difference below cancels all but a part in β/2 of itself.
        dtype, log_p, log_q = log_p.dtype, log_p.double(), log_q.double()
        return (_alpha_beta_terms(log_q, log_p - log_q, alpha, beta).sum(dim=1)).to(dtype)
    return _alpha_beta_terms(log_q, log_ratio, alpha, beta).sum(dim=1)


def _alpha_beta_terms(log_q: Tensor, log_ratio: Tensor, alpha: float, beta: float) -> Tensor:
    log_weight = log_q * (alpha + beta)
    whole = _weighted_relaxed_log(log_weight, log_ratio, alpha + beta)
    return (whole - _weighted_relaxed_log(log_weight, log_ratio, alpha)) / beta


def _weighted_relaxed_log(log_weight: Tensor, log_ratio: Tensor, c: float) -> Tensor:
    """exp(log_weight) · expm1(c·log_ratio)/c, and its limit at c = 0; never 0 · inf."""
    weight = log_weight.clamp(max=LARGEST_EXPONENT).exp()
    if abs(c) < 1e-12:
        return weight * log_ratio
    exponent = c * log_ratio
    small = weight * exponent.clamp(-1.0, 1.0).expm1()
    large = (log_weight + exponent).clamp(max=LARGEST_EXPONENT).exp() - weight
    return torch.where(exponent.abs() < 1.0, small, large) / c


def _log_probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, scale_by_t2: bool, reduction: str
) -> tuple[Tensor, Tensor, float]:
    """log p, log q and the factor of the loss."""
    check_reduction(reduction)
    positive("temperature", temperature)
    student, teacher = prepare(student_logits, teacher_logits)
    log_p, log_q = torch.log_softmax(teacher / temperature, 1), torch.log_softmax(student / temperature, 1)
    return log_p, log_q, temperature**2 if scale_by_t2 else 1.0


def _kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    """log(share·p + (1 - share)·q)."""
    if share_of_p <= 0.0:
        return log_q
    if share_of_p >= 1.0:
        return log_p
    return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log1p(-share_of_p))


def _check_skew(alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise UsageError(f"alpha must be at least 0 and below 1, found {alpha}")
