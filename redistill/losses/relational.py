"""Losses on relations instead of values: Pearson and rank correlation of rows (R2KD, CMKD) and columns (DIST), MLKD."""

from __future__ import annotations

from redistill_cache.errors import UsageError
from torch import Tensor

from redistill.losses.checks import check_reduction, full_precision, prepare, reduce_rows
from redistill.losses.hinton import log_probs, spread, standardize
from redistill.losses.options import positive

__all__ = ["dist", "mlkd_batch", "mlkd_class", "pearson", "spearman"]

# Rows x classes x classes of a pairwise comparison: 2^28 float32 are 1 GiB, about four of which live in the backward.
PAIRS_AT_MOST = 2**28


def correlation(x: Tensor, y: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation along `dim`, eps added to the product of the norms as in DIST's code.

    A constant slice correlates with nothing: 0, with the gradient of a slice of deviation 1. The formula has 1/eps
    there, which is how a zero-initialised student would meet it.
    """
    x, length_x = spread(x, dim)
    y, length_y = spread(y, dim)
    return (x * y).sum(dim) / ((length_x * length_y).squeeze(dim) + eps)


def pearson(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    of: str = "probabilities",
    reduction: str = "batchmean",
) -> Tensor:
    """Correlation distance of the rows: 1 - ρ(s, t), Pearson's ρ over the classes; times T² for probabilities.

    of="probabilities": s, t = softmax(. / T), the inter-class term of DIST and the value term of R2KD
    (Kim et al., arXiv 2311.13934); of="logits": the logits themselves (any T), as after CMKD's z-score
    (Niu et al., arXiv 2410.06561).
    A reading: both papers add a rank term (`spearman`); their weights, and CMKD's weight by difficulty, were not
    available. Give the two terms weights of your own.
    Needs: logits only, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    if of == "logits":
        return reduce_rows(1 - correlation(student, teacher, 1), reduction)
    if of != "probabilities":
        raise UsageError(f"of must be 'probabilities' or 'logits', found {of!r}")
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    return reduce_rows(temperature**2 * (1 - correlation(s, t, 1)), reduction)


def soft_ranks(scores: Tensor, strength: float) -> Tensor:
    """Rank of each class in its row, 1 = highest: 1 + Σ_{j≠i} σ((x_j - x_i) / strength), exact as strength -> 0."""
    gaps = scores[:, None, :] - scores[:, :, None]
    return (gaps / strength).sigmoid().sum(2) + 0.5


def spearman(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    strength: float = 0.1,
    top: int = 0,
    reduction: str = "batchmean",
) -> Tensor:
    """Rank correlation distance of the rows: 1 - ρ(rank z, rank v), with soft ranks; the rank term of R2KD and CMKD.

    Ranks are taken of standardised rows, so that `strength` (the width in which two classes count as tied) means the
    same for every row and teacher. top = K compares only the teacher's K highest classes (0: all).
    Kim et al. (arXiv 2311.13934), Niu et al. (arXiv 2410.06561).
    A reading: which differentiable rank the papers use was not available; this is the pairwise-sigmoid one, O(C²) in
    time and memory (more than 2^28 pairs a batch are refused: use `top`), and strength is chosen here.
    Needs: logits only, full rows (with top: the teacher's K highest).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    strength = positive("strength", strength)
    if top:
        kept = teacher.topk(min(max(top, 2), teacher.shape[1]), dim=1).indices
        student, teacher = student.gather(1, kept), teacher.gather(1, kept)
    if student.shape[0] * student.shape[1] ** 2 > PAIRS_AT_MOST:
        raise UsageError(
            f"spearman compares all pairs of {student.shape[1]} classes in {student.shape[0]} rows, which does not fit "
            f"in memory; set top to a few hundred classes, or use a smaller batch"
        )
    rank_s, rank_t = soft_ranks(standardize(student), strength), soft_ranks(standardize(teacher), strength)
    return reduce_rows(1 - correlation(rank_s, rank_t, 1), reduction)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """DIST: T² · [β (1 - mean_b ρ(s_b, t_b)) + γ (1 - mean_c ρ(s_:c, t_:c))], ρ = Pearson, s, t = softmax(. / T).

    The first part relates the classes within a row, the second the rows within a class.
    Huang et al., NeurIPS 2022 (arXiv 2205.10536).
    Published: β = γ = 1 inside, weight 2 outside, CE 1; T = 4 (CIFAR), T = 1 (ImageNet).
    Needs: batch statistics (a batch of one row has no second part: it is the constant γ T²), full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    check_reduction(reduction, per_row=False)
    temperature = positive("temperature", temperature)
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    inter, intra = 1 - correlation(s, t, 1).mean(), 1 - correlation(s, t, 0).mean()
    return reduce_batch(temperature**2 * (beta * inter + gamma * intra), student, reduction)


def mlkd_class(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """MLKD's class term: ||tᵀt - sᵀs||² / C, the [C, C] Gram matrices of the batch's probabilities at T.

    Jin et al., CVPR 2023. Published: the sum over T in {2, 3, 4, 5, 6} of KL + class + batch term, on a weak and a
    strong view, CE 0.1, KD 0.9; the masks of the weak view and the second view itself are not here.
    Needs: batch statistics, full rows.

    Never builds a [C, C] matrix: with d = t - s and m = t + s, tᵀt - sᵀs = (dᵀm + mᵀd) / 2, whose norm only needs
    [B, B] products; and since all of them carry d, nothing large cancels as s comes near t.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    check_reduction(reduction, per_row=False)
    temperature = positive("temperature", temperature)
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    difference, total = t - s, t + s
    with full_precision(student):
        mixed = difference @ total.T
        squared = ((difference @ difference.T) * (total @ total.T)).sum() + (mixed * mixed.T).sum()
    return reduce_batch(0.5 * squared / student.shape[1], student, reduction)


def mlkd_batch(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """MLKD's batch term: ||t tᵀ - s sᵀ||² / B, the [B, B] Gram matrices of the batch's probabilities at T.

    Jin et al., CVPR 2023; see `mlkd_class` for the published sum.
    Needs: batch statistics, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    check_reduction(reduction, per_row=False)
    temperature = positive("temperature", temperature)
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    with full_precision(student):
        squared = (t @ t.T - s @ s.T).square().sum()
    return reduce_batch(squared / student.shape[0], student, reduction)


def reduce_batch(value: Tensor, rows: Tensor, reduction: str) -> Tensor:
    """A statistic of the batch as `reduction` says; "sum" is the value times the number of rows, as elsewhere."""
    return value * rows.shape[0] if reduction == "sum" else value
