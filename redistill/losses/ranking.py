"""Losses over the teacher's ranking of the classes: PLD (the whole ranking) and TopKD (its top)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import (
    at_least_one,
    check_labels,
    check_reduction,
    full_precision,
    positive,
    prepare,
    reduce_batch,
    reduce_rows,
)
from redistill.losses.divergences import log_probs

__all__ = ["length", "pld", "topkd"]


def pld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Plackett-Luce distillation: Σ_k α_k [ -z_π(k) + log Σ_{l>=k} exp z_π(l) ].

    π = (y, then the other classes by descending teacher logit); α_k = softmax(v / T)_π(k); the student is at T = 1.
    With all weight on the first place it is cross-entropy, with equal weights ListMLE. Convex in z.
    Bassam et al., NeurIPS 2025 (arXiv 2506.12542).
    Published: T = 1 on ImageNet (4 is bad), T = 4 on CIFAR. It replaces CE + KD: use it with CE weight 0.
    Needs: labels, full rows (the whole ranking). Ties are broken by the lower class index.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature = positive("temperature", temperature)
    first = teacher.scatter(1, labels[:, None], torch.inf)
    order = first.argsort(dim=1, descending=True, stable=True)
    ranked = student.gather(1, order)
    weights = log_probs(teacher, temperature).exp().gather(1, order)
    log_tails = ranked.flip(1).logcumsumexp(1).flip(1)
    return reduce_rows((weights * (log_tails - ranked)).sum(1), reduction)


def topkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    k: int = 5,
    top_weight: float = 1.0,
    bottom_weight: float = 1.0,
    contrast_temperature: float = 0.1,
    gain: float = 0.0,
    lift: float = 0.0,
    lift_when_wrong: float = 0.0,
    reduction: str = "batchmean",
) -> Tensor:
    """TopKD, as far as it is published: decoupled cosines over the teacher's top and bottom k, plus a contrast of rows.

    1 - mean_b [ a cos(top k) + b cos(bottom k) + cos(rest) ] + ½ [ CE(ẑ v̂ᵀ / τ, diagonal) + CE(v̂ ẑᵀ / τ, diagonal) ]
    with v = `top_scaled` teacher logits and ẑ, v̂ rows of length 1.
    Wang and Zhou 2025 (arXiv 2508.04539). Published: the two parts, and that k = 3, 5, 10 work and 50 collapses.
    NOT published, as far as we could find, and therefore assumed: the rank weights and gaps of the scaling (off by
    default: gain = lift = 0), a and b (1), τ (0.1, rows normalised), that "negative top k" means the k lowest classes,
    and whether CE is added (the objective sets its weight). Results of this function are not results of the paper.
    Needs: labels, batch statistics, full rows, logits with their shift.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    check_reduction(reduction, per_row=False)
    tau = positive("contrast_temperature", contrast_temperature)
    k = min(at_least_one("k", k), teacher.shape[1] // 2)
    scaled = top_scaled(teacher, labels, k=k, gain=gain, lift=lift, lift_when_wrong=lift_when_wrong)
    top = torch.zeros_like(teacher).scatter(1, teacher.topk(k, dim=1).indices, 1.0)
    bottom = torch.zeros_like(teacher).scatter(1, teacher.topk(k, dim=1, largest=False).indices, 1.0)
    rest = 1 - torch.maximum(top, bottom)
    agreement = top_weight * cosine(student, scaled, top) + bottom_weight * cosine(student, scaled, bottom)
    decoupled = 1 - (agreement + cosine(student, scaled, rest)).mean()
    with full_precision(student):
        similarity = (student / length(student)[:, None]) @ (scaled / length(scaled)[:, None]).T / tau
    own = torch.arange(student.shape[0], device=student.device)
    contrast = 0.5 * (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own))
    return reduce_batch(decoupled + contrast, student, reduction)


def top_scaled(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    k: int,
    gain: float,
    lift: float,
    lift_when_wrong: float,
) -> Tensor:
    """TopKD's scaling module: v'_i = v_i w_i + Δ for i in the teacher's top k or i = y, v'_i = v_i elsewhere.

    Assumed: w_i = 1 + gain · (k - r) / k for rank r = 0.. (1 for a true class outside the top k), Δ = lift · (mean of
    the top k - mean of the rest), and on y lift_when_wrong instead of lift where the teacher's top class is not y.
    """
    top = teacher_logits.topk(k, dim=1)
    rest = (teacher_logits.sum(1) - top.values.sum(1)) / (teacher_logits.shape[1] - k)
    gap = (top.values.mean(1) - rest)[:, None]
    ranks = torch.arange(k, device=teacher_logits.device, dtype=teacher_logits.dtype)
    scaled = teacher_logits.scatter(1, top.indices, top.values * (1 + gain * (k - ranks) / k) + lift * gap)
    true = labels[:, None]
    in_top = (top.indices == true).any(1, keepdim=True)
    wrong = top.indices[:, :1] != true
    of_true = torch.where(in_top, scaled.gather(1, true), teacher_logits.gather(1, true) + lift * gap)
    return scaled.scatter(1, true, of_true + torch.where(wrong, (lift_when_wrong - lift) * gap, 0.0))


def cosine(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Cosine of each row over the classes of `mask`; 0 if the mask is empty."""
    x, y = x * mask, y * mask
    return (x * y).sum(1) / (length(x) * length(y))


def length(x: Tensor) -> Tensor:
    """The length of each row, 1 where it is exactly 0 (an untrained head): a finite gradient instead of 1/0."""
    squared = x.square().sum(1)
    return torch.where(squared > 0, squared, 1.0).sqrt()
