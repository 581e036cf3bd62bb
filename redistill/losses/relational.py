"""Losses on relations between values: correlations (DIST, CMKD, R2KD), Gram matrices (MLKD), transport (Sinkhorn).

`rkd` relates the features of a batch; all others relate logits.
"""

from __future__ import annotations

import torch
from redistill_cache.errors import UsageError
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import (
    at_least_one,
    check_reduction,
    full_precision,
    non_negative,
    positive,
    prepare,
    prepare_features,
    reduce_batch,
    reduce_rows,
)
from redistill.losses.divergences import log_probs
from redistill.losses.hinton import spread, standardize
from redistill.losses.ranking import length

__all__ = ["dist", "mlkd_batch", "mlkd_class", "pearson", "r2kd", "rkd", "sinkhorn", "spearman"]

# Rows x classes x classes of a pairwise comparison (rkd: rows x rows x rows, or x width): 2^28 float32 are 1 GiB, and a
# backward pass holds about four.
MAX_PAIRS = 2**28


def correlation(x: Tensor, y: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation along `dim`, eps added to the product of the norms as in DIST's code.

    A constant slice (of a zero-initialised student, say) has correlation 0 and the gradient of a slice of deviation 1,
    where the formula has a gradient of 1/eps.
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

    of="probabilities": s, t = softmax(. / T), the inter-class term of DIST; of="logits": the logits themselves (any T),
    as after CMKD's z-score (Niu et al., arXiv 2410.06561). The value term of R2KD is another one: `r2kd`.
    Assumed: CMKD adds a rank term (`spearman`); its weights, and its weight by difficulty, were not available to us.
    Choose the weights of the two terms yourself.
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
    """Rank correlation distance of the rows: 1 - ρ(rank z, rank v), with soft ranks, as in the rank term of CMKD.

    Ranks are those of standardised rows, so that `strength` (the gap below which two classes count as tied) means the
    same for every row and teacher. top = K compares only the teacher's K highest classes (0: all).
    Niu et al. (arXiv 2410.06561). In the code of R2KD (arXiv 2311.13934) the ranks are positions in a sorted row, which
    have no gradient.
    Assumed: the differentiable rank of the paper was not available to us; this is the pairwise-sigmoid one, O(C²) in
    time and memory (more than 2^28 pairs per batch are refused: use `top`), and strength is our choice.
    Needs: logits only, full rows (with top: the teacher's K highest).
    """
    student, teacher = prepare(student_logits, teacher_logits)
    strength = positive("strength", strength)
    if top:
        highest = teacher.topk(min(max(top, 2), teacher.shape[1]), dim=1).indices
        student, teacher = student.gather(1, highest), teacher.gather(1, highest)
    if student.shape[0] * student.shape[1] ** 2 > MAX_PAIRS:
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
    Needs: batch statistics (for a batch of one row the second part is the constant γ T²), full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    check_reduction(reduction, per_row=False)
    temperature = positive("temperature", temperature)
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    inter, intra = 1 - correlation(s, t, 1).mean(), 1 - correlation(s, t, 0).mean()
    return reduce_batch(temperature**2 * (beta * inter + gamma * intra), student, reduction)


def r2kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """R2KD's value term: T² · [(1 - mean_b |cos(s_b, t_b)|) + (1 - mean_c |cos(s_:c, t_:c)|)], s, t = softmax(. / T).

    DIST with cosines in place of correlations: the means are not subtracted.
    Kim et al., IEEE TKDE 2024 (arXiv 2311.13934), as in the authors' code.
    Published: T = 4, weight 2, CE 1. Their rank term, weight 2, is a constant for training, since its ranks have no
    gradient; it is not included, nor are the second teacher (a pruned one) and the second, augmented view.
    Needs: batch statistics, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    check_reduction(reduction, per_row=False)
    temperature = positive("temperature", temperature)
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    of_rows, of_columns = 1 - cosine(s, t).abs().mean(), 1 - cosine(s.T, t.T).abs().mean()
    return reduce_batch(temperature**2 * (of_rows + of_columns), student, reduction)


def cosine(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosine of each row, eps added to the product of the lengths as in R2KD's code."""
    return (x * y).sum(1) / (length(x) * length(y) + eps)


def mlkd_class(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "batchmean",
) -> Tensor:
    """MLKD's class term: ||tᵀt - sᵀs||² / C, the [C, C] Gram matrices of the batch's probabilities at T.

    Jin et al., CVPR 2023. Published: CE 0.1, KD 0.9, on a weak and a strong view of each image. In the authors' code
    the class and batch terms act on the weak view only, at T in {2, 3, 4, 5, 6}, as does KL there; KL on the strong
    view is at T in {3, 4, 5}; the masks of the weak view are a constant 0.5. Only the two terms at one T are
    implemented, without masks and second view.
    Needs: batch statistics, full rows.

    Never builds a [C, C] matrix: with d = t - s and m = t + s, tᵀt - sᵀs = (dᵀm + mᵀd) / 2, whose norm only needs
    [B, B] products; and since each of them has a factor d, nothing large cancels as s approaches t.
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


def sinkhorn(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    blur: float = 0.1,
    rounds: int = 20,
    reduction: str = "batchmean",
) -> Tensor:
    """Sinkhorn distillation, optimal transport between the rows of a batch: Σ_ij P_ij W_ij, W_ij = ||s_i - t_j||_1.

    P comes from exp(-W / blur) by `rounds` rounds of normalising the rows, then the columns, to sum 1; in log space,
    so that a small blur does not underflow. The gradient goes through P as well.
    Cui et al., COLING 2024 / AAAI 2025 (SinKD, arXiv 2402.17110).
    Published: T = 2, blur 0.1, 20 rounds, weight 0.001 (times 0.8), added to KL and CE; the sum is over the batch.
    Needs: batch statistics (for a batch of one row it is the L1 distance of the two), full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    check_reduction(reduction, per_row=False)
    temperature, blur = positive("temperature", temperature), positive("blur", blur)
    s, t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    with full_precision(student):
        cost = torch.cdist(s, t, p=1.0)
    log_plan = -cost / blur
    for _ in range(at_least_one("rounds", rounds)):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return reduce_batch((log_plan.exp() * cost).sum(), student, reduction)


def rkd(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    reduction: str = "batchmean",
) -> Tensor:
    """RKD: w_d mean_ij smooth_l1(d_ij(s) - d_ij(t)) + w_a mean_jik smooth_l1(cos_jik(s) - cos_jik(t)) over a batch.

    d_ij = |x_i - x_j| over its mean for i ≠ j, cos_jik = the cosine of the angle at x_j between x_i and x_k. Neither
    changes if the rows are moved, rotated or scaled, and the widths may differ, so that no projector is needed.
    Park et al., CVPR 2019 (arXiv 1904.05068), as in the authors' code: the means are over all pairs and triplets, those
    with equal indices included, which are 0.
    Published: weights 25 and 50 with CE, on the last features. Rows that coincide have distance 0 (1e-6 in
    the code).
    Needs: batch statistics (for a batch of one row it is 0), features of both. O(B³) in time and memory.
    """
    student, teacher = prepare_features(student_features, teacher_features)
    check_reduction(reduction, per_row=False)
    non_negative("distance_weight", distance_weight)
    non_negative("angle_weight", angle_weight)
    count, width = len(student), max(student.shape[1], teacher.shape[1])
    if count * count * max(count, width) > MAX_PAIRS:
        raise UsageError(
            f"rkd compares all triplets of {count} rows of width {width}, which does not fit in memory; "
            "use a smaller batch"
        )
    (distances_s, angles_s), (distances_t, angles_t) = distances_and_angles(student), distances_and_angles(teacher)
    value = distance_weight * F.smooth_l1_loss(distances_s, distances_t)
    return reduce_batch(value + angle_weight * F.smooth_l1_loss(angles_s, angles_t), student, reduction)


def distances_and_angles(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pairs over their mean, [B, B], and cosines at j between i and k, [B, B, B]; 0 for equal rows."""
    differences = rows[None] - rows[:, None]
    squared = differences.square().sum(2)
    lengths = torch.where(squared > 0, squared, 1.0).sqrt()
    distances = torch.where(squared > 0, lengths, 0.0)
    mean = distances.sum() / max(len(rows) * (len(rows) - 1), 1)
    directions = differences / lengths[:, :, None]
    with full_precision(rows):
        angles = directions @ directions.transpose(1, 2)
    return distances / torch.where(mean > 0, mean, 1.0), angles
