"""Losses on the logits themselves, not on their softmax: squared error, and per-class binary distillation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import positive, prepare, reduce_rows

__all__ = ["logit_mse", "mld"]


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    centered: bool = False,
    reduction: str = "batchmean",
) -> Tensor:
    """Squared error of the logits: mean over the classes of (z - v)².

    Ba and Caruana, NeurIPS 2014 (arXiv 1312.6184), in the per-element mean that Kim et al., IJCAI 2021
    (arXiv 2105.08919) found to beat KL on clean teachers.
    centered=True removes the mean of each row from both first: the loss then asks nothing of the logits' shift.
    Needs: logits whose shift was kept, unless centered.
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

    Yang et al., ICCV 2023 (L2D, arXiv 2308.06453); T ≠ 1 divides both logits and multiplies by T², as KD does.
    Published: T = 1, weight 10. The embedding terms of the paper need features and are not here.
    Needs: logits whose shift was kept (a sigmoid is not invariant to it).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    student, teacher = student / temperature, teacher / temperature
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return reduce_rows(temperature**2 * (present + absent).sum(1), reduction)
