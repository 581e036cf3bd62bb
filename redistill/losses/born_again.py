"""The two controls of Born-Again networks: CWTM keeps only the teacher's confidence, DKPP only its shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import check_labels, prepare, reduce_rows
from redistill.losses.hinton import kl_rows, log_probs

__all__ = ["cwtm", "dkpp", "permute_others"]


def cwtm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    reduction: str = "batchmean",
) -> Tensor:
    """Confidence-weighted by teacher max: Σ_b (max t_b / Σ_u max t_u) · CE(y_b, s_b), all at T = 1.

    The value of row b is B times its share, so that the mean over rows is the formula.
    Furlanello et al., ICML 2018 (arXiv 1805.04770); recalled, not read again. It is the hard-label term: CE weight 0.
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
    """Dark knowledge with permuted predictions: KL(t' || s) at T = 1, t' = t with all but its top class shuffled.

    Furlanello et al., ICML 2018 (arXiv 1805.04770); recalled, not read again.
    The shuffle of a row is a function of the row's own teacher logits and of `seed`: the same row gets the same
    shuffle in any batch, run or machine, another view of it another one.
    Needs: full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    return reduce_rows(kl_rows(log_probs(permute_others(teacher, seed)), log_probs(student)), reduction)


def permute_others(logits: Tensor, seed: int = 0) -> Tensor:
    """Every row with its highest class in place and the others in an order drawn from the row's bits and `seed`."""
    bits = logits.float().contiguous().view(torch.int32).long()
    columns = torch.arange(logits.shape[1], device=logits.device)
    row = mixed(bits + mixed(columns + seed)).sum(1, keepdim=True)
    draw = mixed(row + mixed(columns))
    best = logits.argmax(1, keepdim=True)
    # Two orders that both begin with the highest class: where the others are, and where they are taken from.
    first = torch.zeros_like(draw).scatter(1, best, 1)
    taken = draw.scatter(1, best, torch.iinfo(torch.int64).max).argsort(dim=1, descending=True, stable=True)
    places = first.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(logits).scatter(1, places, logits.gather(1, taken))


def mixed(value: Tensor) -> Tensor:
    """A 64-bit integer hash (the finaliser of SplitMix64): no generator state, the same on every device."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & 0x1FFFFFFFF)
