"""Divergences between the teacher's and the student's probabilities, beside the power divergence.

Some are members of the power family under their own names (`kl`, `reverse_kl`, `hellinger`). In all of them
p = softmax(teacher/T), q = softmax(student/T); the teacher is a constant; times T² if `scale_by_t2`.
"""

from __future__ import annotations

import math

import torch
from redistill_cache.errors import UsageError
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import check_reduction, positive, prepare, reduce_rows
from redistill.losses.power import LARGEST_EXPONENT, power_divergence

__all__ = [
    "alpha_beta",
    "hellinger",
    "jensen_shannon",
    "kl",
    "kl_rows",
    "log_probs",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]


def log_probs(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the classes."""
    return F.log_softmax(logits / temperature, dim=-1)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of every row, from log-probabilities; a class with p = 0 adds nothing, however small q is."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(p || q) = Σ p log(p/q), the member lam = 0 of the power divergence. Unbounded. Needs logits only.

    Kullback, Leibler 1951; as a distillation loss Hinton et al. 2015, whose `kd` has the same value.
    Defaults: T = 4, times T².
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

    MiniLLM (arXiv 2306.08543) for language models; its sampling is not implemented. Defaults: T = 4, times T².
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

    Beran 1977 shows its robustness. The factor 4 makes it agree with KL to second order, so weights carry over.
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
    goes to 0 as β -> 0 (like β·KL) and as β -> 1 (like (1-β)·reverse KL), so both ends are refused.
    Defaults: β = 0.5, T = 1.
    """
    if not 0.0 < beta < 1.0:
        raise UsageError(f"beta must lie strictly between 0 and 1, found {beta}; use kl or reverse_kl at the ends")
    log_p, log_q, scale = _prepare_log_probs(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    log_m = _log_mixture(log_p, log_q, beta)
    rows = beta * kl_rows(log_p, log_m) + (1.0 - beta) * kl_rows(log_q, log_m)
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
    log_p, log_q, scale = _prepare_log_probs(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    return reduce_rows(scale * kl_rows(log_p, _log_mixture(log_p, log_q, alpha)), reduction)


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
    log_p, log_q, scale = _prepare_log_probs(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    return reduce_rows(scale * kl_rows(log_q, _log_mixture(log_p, log_q, 1.0 - alpha)), reduction)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: str = "batchmean",
) -> Tensor:
    """½ Σ |p - q|, at most 1; the size of its gradient does not depend on that of the difference. Needs logits only.

    f-distill (arXiv 2307.15190). Defaults: T = 1.
    """
    log_p, log_q, scale = _prepare_log_probs(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
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
    `hellinger`, (1, 1) half the squared distance, (1+k, -k) the power divergence with Cressie-Read's sign. A small α
    limits the influence of a wrong teacher, a large β follows the student's confidence. Bounded for α, β > 0.

    The limits carry 1/α² and 1/β², so that the loss is continuous in α and β; the authors' code has 1/α and 1/β,
    which is another loss unless |α| = 1. Exponents are clamped at 60 (α or β < 0, extreme logits).
    Defaults, as published for CIFAR-100: α = 0.8, β = 0.3, T = 4, no T² factor (their weight, 32, is 2 T²), CE 1.
    """
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise UsageError(f"alpha and beta must be finite numbers, found {alpha} and {beta}")
    log_p, log_q, scale = _prepare_log_probs(student_logits, teacher_logits, temperature, scale_by_t2, reduction)
    # The divergence is symmetric under p <-> q with α <-> β; dividing by the larger of the two keeps precision.
    if abs(alpha) > abs(beta):
        rows = _alpha_beta_rows(log_q, log_p, beta, alpha)
    else:
        rows = _alpha_beta_rows(log_p, log_q, alpha, beta)
    return reduce_rows(scale * rows, reduction)


def _alpha_beta_rows(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Σ q^σ [f_σ(r) - f_α(r)] / β with σ = α + β, r = log(p/q), f_c(r) = expm1(cr)/c: singular at β = 0 only."""
    log_ratio = log_p - log_q
    if abs(beta) < 1e-6:
        return 0.5 * log_ratio.square().sum(dim=1)
    if abs(beta) < 0.05:
        # |α| <= |β|, so both are nearly 0, and the difference below cancels all but a fraction β/2.
        device, dtype = log_p.device, log_p.dtype
        if device.type == "mps":  # it has no float64
            log_p, log_q = log_p.cpu(), log_q.cpu()
        log_p, log_q = log_p.double(), log_q.double()
        return _alpha_beta_terms(log_q, log_p - log_q, alpha, beta).sum(dim=1).to(device, dtype)
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


def _prepare_log_probs(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, scale_by_t2: bool, reduction: str
) -> tuple[Tensor, Tensor, float]:
    """log p, log q and the factor T² or 1."""
    check_reduction(reduction)
    positive("temperature", temperature)
    student, teacher = prepare(student_logits, teacher_logits)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    return log_p, log_q, temperature**2 if scale_by_t2 else 1.0


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
