"""Hinton's knowledge distillation, and the logit standardisation that can go in front of any loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import prepare, reduce_rows
from redistill.losses.options import positive

__all__ = ["kd", "kl_rows", "log_probs", "spread", "standardize"]


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
