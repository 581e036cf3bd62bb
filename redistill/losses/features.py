"""Losses on the pooled features of one pair of layers: matching, norm and direction, orthogonal projection, contrast.

The geometry of a batch (`rkd`) is in `relational`; losses through a head or an adapter of their own are in `heads`.
"""

from __future__ import annotations

import math

import torch
from redistill_cache.errors import UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.losses.checks import (
    at_least_one,
    check_classes,
    check_features,
    check_reduction,
    full_precision,
    linear,
    non_negative,
    one_of,
    positive,
    prepare_features,
    reduce_batch,
    reduce_rows,
    refuse_unfitted,
    rows_of_classes,
)
from redistill.losses.divergences import kl_rows
from redistill.losses.ranking import length

__all__ = ["Contrast", "FeatureMatch", "NormDirection", "OrthogonalMatch", "OrthogonalProjector"]


class FeatureMatch(nn.Module):
    """Feature matching: the distance of P f_s and f_t, P a bias-free linear map to the teacher's width.

    match="mse": mean over the elements of (P f_s - f_t)²; match="cosine": 1 - cos(P f_s, f_t).
    project="none": P is the identity, for layers of one width.
    "Logit-Based Losses Limit the Effectiveness of Feature Knowledge Distillation" (arXiv 2511.14981), as in the
    authors' code, where the backbone learns from features alone and cross-entropy trains the last layer on detached
    features. There, P is a 1x1 convolution on maps; here it acts on pooled rows.
    Published: mse with a linear map, weight 1, mean over the pairs of layers.
    Needs: features of both, a projector.
    """

    def __init__(self, *, student_width: int, teacher_width: int, match: str = "mse", project: str = "linear") -> None:
        super().__init__()
        self.teacher_width = teacher_width
        self.match = one_of("match", match, ("mse", "cosine"))
        self.projector: nn.Linear | None = None
        if one_of("project", project, ("linear", "none")) == "linear":
            self.projector = nn.Linear(student_width, teacher_width, bias=False)
        elif student_width != teacher_width:
            raise UsageError(
                f"project=none needs layers of one width, found {student_width} in the student and {teacher_width} in "
                "the teacher; use project=linear"
            )

    def forward(self, student_features: Tensor, teacher_features: Tensor, *, reduction: str = "batchmean") -> Tensor:
        student, teacher = prepare_features(student_features, teacher_features)
        check_features("teacher", teacher, self.teacher_width)
        if self.projector is not None:
            student = linear(self.projector, student)
        check_features("student", student, self.teacher_width)
        if self.match == "mse":
            return reduce_rows((student - teacher).square().mean(1), reduction)
        return reduce_rows(1 - (student * teacher).sum(1) / (length(student) * length(teacher)), reduction)


class NormDirection(nn.Module):
    """ND of KD++: 1 - <P f_s, e_y> / max(|P f_s|, |f_t|), e_c the mean of the teacher's rows of class c, of length 1.

    The student's row is pulled in the direction of its class, and to at least the length of the teacher's.
    Wang et al. (arXiv 2305.17007), as in the authors' code, whose weight is 0.5 to 4 by pair, beside CE 1 and KD.
    Published: weight 2 (ResNet-56 to ResNet-20), on penultimate features.
    Deviation: for other widths the authors put batch normalisation, dropout 0.5 and a linear layer before the loss;
    here P is bias-free and linear, and the identity for equal widths. The means are those of the rows given to `fit`;
    a class without rows there has no direction, and its rows have the constant value 1.
    Needs: labels, features of both, `fit`.
    """

    directions: Tensor

    def __init__(self, *, student_width: int, teacher_width: int, num_classes: int) -> None:
        super().__init__()
        same = student_width == teacher_width
        self.projector = None if same else nn.Linear(student_width, teacher_width, bias=False)
        self.register_buffer("directions", torch.full((num_classes, teacher_width), math.nan))

    @torch.no_grad()
    def fit(self, teacher_features: Tensor, labels: Tensor) -> None:
        """The directions of the classes."""
        num_classes, width = self.directions.shape
        rows = rows_of_classes(teacher_features, labels, width, num_classes)
        means = torch.stack([of_class.sum(0) / max(len(of_class), 1) for of_class in rows])
        self.directions.copy_(means / length(means)[:, None])

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, *, labels: Tensor, reduction: str = "batchmean"
    ) -> Tensor:
        student, teacher = prepare_features(student_features, teacher_features)
        refuse_unfitted(self.directions)
        check_features("teacher", teacher, self.directions.shape[1])
        labels = check_classes(labels, len(student), len(self.directions))
        if self.projector is not None:
            student = linear(self.projector, student)
        check_features("student", student, self.directions.shape[1])
        along = (student * self.directions.to(student.dtype)[labels]).sum(1)
        longest = torch.maximum(student.square().sum(1), teacher.square().sum(1))
        return reduce_rows(1 - along / torch.where(longest > 0, longest, 1.0).sqrt(), reduction)


class OrthogonalProjector(nn.Module):
    """A linear map [rows, n] -> [rows, m] with orthonormal rows or columns, whichever are fewer.

    The weight is a random orthogonal matrix times the Cayley transform (I + A/2)^-1 (I - A/2) of a skew-symmetric A
    that is 0 outside its first k = min(n, m) columns and rows, of which the first k columns are taken:
        A = [[L - L^T, -R^T], [R, 0]],  G = (L - L^T)/2 + R^T R / 4,  Q = [(I + G)^-1 (I - G); -R (I + Q_1) / 2].
    The inverse always exists, since the symmetric part of I + G is at least I, so that nothing has to be checked on the
    device. (torch's own parametrisation synchronises the device, and for unequal widths a weight decay sets its columns
    to 0.) L and R start at 0, and a weight decay pulls the map towards its start.
    """

    start: Tensor

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m, self.k = n, m, min(n, m)
        largest = max(n, m)
        self.register_buffer("start", nn.init.orthogonal_(torch.empty(largest, largest)))
        self.free = nn.Parameter(torch.zeros(largest, self.k))
        """[L; R]; of L, the part below the diagonal."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[m, n]"""
        free, start = self.free.to(dtype), self.start.to(dtype)
        lower, rest = free[: self.k].tril(-1), free[self.k :]
        one = torch.eye(self.k, dtype=dtype, device=free.device)
        with full_precision(free):
            generator = (lower - lower.T) / 2 + rest.T @ rest / 4
            top = torch.linalg.solve_ex(one + generator, one - generator).result
            weight = start @ torch.cat([top, -rest @ (one + top) / 2])
        return weight.T if self.m < self.n else weight

    def forward(self, rows: Tensor) -> Tensor:
        check_features("student", rows, self.n)
        weight = self.weight(rows.dtype)
        with full_precision(rows):
            return F.linear(rows, weight)


class OrthogonalMatch(nn.Module):
    """V_kD: mean over the elements of smooth_l1(P f_s - norm(f_t)), P an orthogonal projector, norm standardising rows.

    If the teacher is at least as wide, P keeps the angles and distances of the student's rows, so that the student has
    to learn the teacher's. norm is the "task-specific normalisation" for classification: each teacher row gets mean 0
    and variance 1 (layer norm).
    Miles, Elezi and Deng, CVPR 2024 (arXiv 2403.06213), as in the authors' code for ImageNet, on pooled last features.
    Published: weight 1, CE 1, with a distillation token of the student beside it (KL, weight 1), which is not included;
    nor is the whitening for image generation.
    Needs: features of both, a projector.
    """

    def __init__(self, *, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.projector = OrthogonalProjector(student_width, teacher_width)

    def forward(self, student_features: Tensor, teacher_features: Tensor, *, reduction: str = "batchmean") -> Tensor:
        student, teacher = prepare_features(student_features, teacher_features)
        check_features("teacher", teacher, self.projector.m)
        target = F.layer_norm(teacher, teacher.shape[1:])
        return reduce_rows(F.smooth_l1_loss(self.projector(student), target, reduction="none").mean(1), reduction)


class Contrast(nn.Module):
    """DCD: CE(S, diagonal) + α KL(softmax of the columns of S || softmax of its rows), S_ij = s cos(P f_s,i, R f_t,j).

    The first part asks that row i of the student is closest to row i of the teacher in the batch, the second that
    student to teacher and teacher to student give the same distribution. P, R are linear maps to `width`, and
    s = min(exp(τ), max_scale) with learned τ.
    Giakoumoglou and Stathaki (arXiv 2407.11802), as in the authors' code, on penultimate features.
    Published: width 128, α = 0.5, τ starts at 1, max_scale 10, weight 1, CE 1, alone or with KD at weight 1.
    Deviation: the published learned bias b, added to all of S alike, is left out, since both softmaxes ignore it.
    Needs: batch statistics (for a batch of one row it is 0), features of both, two linear maps and τ.
    """

    def __init__(
        self,
        *,
        student_width: int,
        teacher_width: int,
        width: int = 128,
        consistency: float = 0.5,
        max_scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.consistency = non_negative("consistency", consistency)
        self.max_scale = positive("max_scale", max_scale)
        self.embed_student = nn.Linear(student_width, at_least_one("width", width))
        self.embed_teacher = nn.Linear(teacher_width, width)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, student_features: Tensor, teacher_features: Tensor, *, reduction: str = "batchmean") -> Tensor:
        student, teacher = prepare_features(student_features, teacher_features)
        check_reduction(reduction, per_row=False)
        student, teacher = linear(self.embed_student, student), linear(self.embed_teacher, teacher, "teacher")
        scale = self.log_scale.to(student.dtype).exp().clamp(max=self.max_scale)
        with full_precision(student):
            similarity = scale * (student / length(student)[:, None]) @ (teacher / length(teacher)[:, None]).T
        of_rows, of_columns = F.log_softmax(similarity, 1), F.log_softmax(similarity, 0).T
        value = self.consistency * kl_rows(of_columns, of_rows).mean() - of_rows.diagonal().mean()
        return reduce_batch(value, student, reduction)
