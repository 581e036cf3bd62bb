"""Losses with separate terms for the target class and for the other classes: DKD, NKD, RLD."""

from __future__ import annotations

import torch
from torch import Tensor

from redistill.losses.checks import check_labels, positive, prepare, reduce_rows
from redistill.losses.divergences import kl_rows, log_probs

__all__ = ["dkd", "nkd", "rld"]

# Far below any logit but finite: a masked class gets probability 0 without inf - inf in the KL.
MASKED = -1e30


def others(values: Tensor, index: Tensor) -> Tensor:
    """[B, C-1]: every row without its entry at index[b], order kept."""
    columns = torch.arange(values.shape[1] - 1, device=values.device).expand(values.shape[0], -1)
    return values.gather(1, columns + (columns >= index[:, None]).long())


def log_split(logits: Tensor, index: Tensor) -> Tensor:
    """[B, 2]: log-probabilities of class index[b] and of all others together, exact where either is tiny."""
    log_total = logits.logsumexp(1)
    log_target = logits.gather(1, index[:, None])[:, 0] - log_total
    return torch.stack([log_target, others(logits, index).logsumexp(1) - log_total], dim=1)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Decoupled knowledge distillation: T² · [α KL(b_t || b_s) + β KL(t̂ || ŝ)].

    b = (p_y, 1 - p_y); t̂, ŝ = softmax over the classes other than y; all at temperature T.
    Zhao et al., CVPR 2022 (arXiv 2203.08679).
    Published: α = 1, T = 4, β = 8 (2 for ResNet56-20 and ResNet110-32, 6 for VGG13 and WRN40-2 pairs); ImageNet T = 1,
    β = 0.5 (ResNet34-18) or 2 (ResNet50-MobileNet). CE weight 1, warm-up over 20 epochs (ImageNet: 1).
    Needs: labels, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature = positive("temperature", temperature)
    student, teacher = student / temperature, teacher / temperature
    target = kl_rows(log_split(teacher, labels), log_split(student, labels))
    rest = kl_rows(log_probs(others(teacher, labels)), log_probs(others(student, labels)))
    return reduce_rows(temperature**2 * (alpha * target + beta * rest), reduction)


def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    gamma: float = 3.5,
    temperature: float = 3.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Normalised knowledge distillation: -t_y log s_y - γ T² Σ_{i≠y} t̂_i log ŝ_i.

    The target part is at T = 1; t̂, ŝ are renormalised over the classes other than y, at T. It is a cross-entropy,
    not a divergence: its minimum is not 0.
    Yang et al., ICCV 2023 (arXiv 2303.13005).
    Published: γ = 3.5, T = 3 (CIFAR-100); γ = 1.5, T = 1 (ImageNet); CE weight 1.
    Needs: labels, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature = positive("temperature", temperature)
    teacher_target = log_split(teacher, labels)[:, 0].exp()
    target = -teacher_target * log_split(student, labels)[:, 0]
    teacher_rest = log_probs(others(teacher, labels), temperature).exp()
    rest = -(teacher_rest * log_probs(others(student, labels), temperature)).sum(-1)
    return reduce_rows(target + gamma * temperature**2 * rest, reduction)


def rld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 0.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Refined logit distillation: α T_a² KL((max t, 1 - max t) || (s_y, 1 - s_y)) + β T² KL(t_M || s_M).

    The first part, at T_a = confidence_temperature (0: the same as temperature), transfers the teacher's confidence to
    the true class, whichever class the teacher predicts. The second is over M = {k: v_k < v_y} only: every class that
    the teacher ranks at or above the true one is masked, so that its mistakes are not copied. M is empty if the teacher
    ranks y last.
    Sun et al., ICCV 2025 (arXiv 2408.07703).
    Published: α = 1, β = 8, T = T_a = 4 (the authors' command for CIFAR-100; swept by pair); ImageNet β = 0.5 or 2,
    T = 1; CE 1; warm-up.
    Needs: labels, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature = positive("temperature", temperature)
    confidence_t = positive("confidence_temperature", confidence_temperature or temperature)
    teacher_split = log_split(teacher / confidence_t, teacher.argmax(1))
    confidence = kl_rows(teacher_split, log_split(student / confidence_t, labels))
    masked = teacher >= teacher.gather(1, labels[:, None])
    correlation = kl_rows(
        log_probs((teacher / temperature).masked_fill(masked, MASKED)),
        log_probs((student / temperature).masked_fill(masked, MASKED)),
    )
    return reduce_rows(alpha * confidence_t**2 * confidence + beta * temperature**2 * correlation, reduction)
