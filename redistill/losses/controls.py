"""Controls, which show how much of a gain is not due to the teacher's full predictions.

`label_smoothing`, `virtual_teacher` and `tf_kd` use no teacher at all: what they gain is regularisation. `cwtm` and
`dkpp`, of Born-Again networks, use only the teacher's confidence and only the shape of its distribution.
"""

from __future__ import annotations

import torch
from redistill_cache.errors import UsageError
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import check_labels, fraction, positive, prepare, reduce_rows
from redistill.losses.divergences import kl_rows, log_probs

__all__ = ["cwtm", "dkpp", "label_smoothing", "permute_others", "tf_kd", "virtual_teacher"]


def label_smoothing(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    smoothing: float = 0.1,
    reduction: str = "batchmean",
) -> Tensor:
    """Label smoothing: -(1 - ε) log s_y - ε mean_k log s_k. The teacher's logits are checked and not used.

    Szegedy et al., CVPR 2016 (arXiv 1512.00567). Published: ε = 0.1. It contains the hard-label term: CE weight 0.
    Needs: labels.
    """
    student, _ = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    smoothing = fraction("smoothing", smoothing)
    log_s = log_probs(student)
    hard = -log_s.gather(1, labels[:, None])[:, 0]
    return reduce_rows((1 - smoothing) * hard - smoothing * log_s.mean(1), reduction)


def virtual_teacher(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    confidence: float = 0.99,
    temperature: float = 20.0,
    reduction: str = "batchmean",
) -> Tensor:
    """KD from a constructed teacher that is always right: T² · KL(p_T || softmax(z/T)), p_y = a, p_k = (1 - a)/(C - 1).

    p_T is p softened to temperature T, that is softmax(log p / T). confidence = a = 1/C is the uniform teacher.
    Yuan et al., CVPR 2020 (arXiv 1909.11723): the formula of the paper, whose minimum is at s_y = a. The published
    numbers are of `tf_kd`, the loss in the authors' code, which is another one. The teacher's logits are checked and
    not used.
    Published: a = 0.99, T = 20, weights 0.9 CE + 0.1.
    Needs: labels.
    """
    student, _ = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature = positive("temperature", temperature)
    virtual = virtual_probs(student, labels, confidence).log()
    rows = kl_rows(log_probs(virtual, temperature), log_probs(student, temperature))
    return reduce_rows(temperature**2 * rows, reduction)


def tf_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    confidence: float = 0.99,
    temperature: float = 20.0,
    multiplier: float = 100.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Tf-KD_reg as in its authors' code: (m / C) · KL(softmax(p / T) || softmax(z)), p_y = a, p_k = (1 - a)/(C - 1).

    The probabilities p are divided by T, not their logarithms, so the target is nearly uniform: 0.0105 for the true
    class of 100. It is label smoothing with a smoothing near 1; the student is at T = 1. The code takes the mean over
    the classes too, hence m / C. Yuan et al., CVPR 2020 (arXiv 1909.11723). The teacher's logits are checked and not
    used.
    Published: a = 0.99, T = 20, m = `multiplier` = 100, weights 0.9 CE + 0.1 (CIFAR-100).
    Needs: labels.
    """
    student, _ = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    temperature, multiplier = positive("temperature", temperature), positive("multiplier", multiplier)
    target = log_probs(virtual_probs(student, labels, confidence), temperature)
    return reduce_rows(multiplier / student.shape[1] * kl_rows(target, log_probs(student)), reduction)


def virtual_probs(like: Tensor, labels: Tensor, confidence: float) -> Tensor:
    """[B, C]: `confidence` for the label, the rest in equal parts for the other classes."""
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must be between 0 and 1, both excluded, found {confidence}")
    others = torch.full_like(like, (1 - confidence) / (like.shape[1] - 1))
    return others.scatter(1, labels[:, None], confidence)


def cwtm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    reduction: str = "batchmean",
) -> Tensor:
    """Confidence-weighted by teacher max: Σ_b (max t_b / Σ_u max t_u) · CE(y_b, s_b), all at T = 1.

    The value of row b is B times its share, so that the mean over rows is the formula.
    Furlanello et al., ICML 2018 (arXiv 1805.04770). It is the hard-label term: CE weight 0.
    Assumed: the formula is recalled, not checked against the paper.
    Needs: labels, batch statistics (the sum of the weights).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    labels = check_labels(labels, student)
    confidence = log_probs(teacher).amax(1).exp()
    weights = confidence / confidence.mean()
    return reduce_rows(weights * F.cross_entropy(student, labels, reduction="none"), reduction)


def dkpp(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    seed: int = 0,
    reduction: str = "batchmean",
) -> Tensor:
    """Dark knowledge with permuted predictions: KL(t' || s) at T = 1, t' = t with all classes but the highest permuted.

    Furlanello et al., ICML 2018 (arXiv 1805.04770).
    Assumed: the formula is recalled, not checked against the paper.
    The permutation of a row is a function of the row's teacher logits and of `seed`: the same row gets the same
    permutation in any batch, in any run and on any machine; another view of the image gets another one.
    Needs: full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    return reduce_rows(kl_rows(log_probs(permute_others(teacher, seed)), log_probs(student)), reduction)


def permute_others(logits: Tensor, seed: int = 0) -> Tensor:
    """Every row with its highest class in place and the others in an order drawn from the row's bits and `seed`."""
    bits = logits.float().contiguous().view(torch.int32).long()
    columns = torch.arange(logits.shape[1], device=logits.device)
    row_hash = hashed(bits + hashed(columns + seed)).sum(1, keepdim=True)
    draw = hashed(row_hash + hashed(columns))
    best = logits.argmax(1, keepdim=True)
    # Two orders that both begin with the highest class: the places to fill, and the places to take the values from.
    first = torch.zeros_like(draw).scatter(1, best, 1)
    sources = draw.scatter(1, best, torch.iinfo(torch.int64).max).argsort(dim=1, descending=True, stable=True)
    places = first.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(logits).scatter(1, places, logits.gather(1, sources))


def hashed(value: Tensor) -> Tensor:
    """A 64-bit integer hash (the finaliser of SplitMix64): no generator state, the same on every device."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & 0x1FFFFFFFF)
