"""Losses through a layer of their own: heads on the student's features, an adapter of the teacher's logits.

These layers are parameters of the loss: they train with the student, and are not part of the saved student.
"""

from __future__ import annotations

import math

import torch
from redistill_cache.errors import UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.losses.checks import (
    at_least_one,
    check_features,
    check_labels,
    check_same_batch,
    full_precision,
    linear,
    non_negative,
    positive,
    prepare,
    prepare_features,
    reduce_rows,
    refuse_unfitted,
    rows_of_classes,
)
from redistill.losses.divergences import kl_rows, log_probs

__all__ = ["AdaptedTeacher", "DualHead", "ExitHead", "SubclassHead"]


class DualHead(nn.Module):
    """DHO's second head: T² KL(softmax(v/T) || softmax(h(f_s)/T)), h a linear layer on the student's features.

    The teacher's and the labels' gradients meet in the backbone only, not in one classifier.
    Kang et al. (arXiv 2505.07675); a second head with another loss is DHKD's (Yang et al., arXiv 2411.08937).
    Published: T = 2, weights 0.5 CE + 0.5, on penultimate features.
    Deviation: the published prediction is a mixture of both heads; here the saved student has its own head alone.
    detach=true: h learns on features without gradient, so that the backbone learns from the other terms alone. For the
    reverse, a backbone that learns from the teacher alone, train the labels' head on detached features: ce?on=head.
    Needs: features of the student, logits of the teacher, a head.
    """

    def __init__(self, *, student_width: int, num_classes: int, temperature: float = 2.0, detach: bool = False) -> None:
        super().__init__()
        self.temperature, self.detach = positive("temperature", temperature), detach
        self.head = nn.Linear(student_width, num_classes)

    def forward(self, student_features: Tensor, teacher_logits: Tensor, *, reduction: str = "batchmean") -> Tensor:
        features = student_features.detach() if self.detach else student_features
        student, teacher = prepare(linear(self.head, features), teacher_logits)
        rows = kl_rows(log_probs(teacher, self.temperature), log_probs(student, self.temperature))
        return reduce_rows(self.temperature**2 * rows, reduction)


class ExitHead(nn.Module):
    """OFA-KD's exit: -Σ_k [(t_k + 1{k=y})^ε - 1{k=y}] log s_k, s = softmax(h(f_s)/T), t = softmax(v/T), h linear.

    An inner layer of the student predicts the teacher's logits through its own exit, so that architectures of another
    kind need not share a feature space. ε > 1 raises the weight of the true class; ε = 1 is cross-entropy with t.
    Hao et al., NeurIPS 2023 (arXiv 2310.19444), as in the authors' code.
    Published: T = 1, no factor T², ε = 1 (CIFAR-100) or 1.5 (ImageNet), weight 1 for each of four stages, CE 1, and the
    same loss with weight 1 on the student's logits, which is not included.
    Deviation: the published exits have convolutions or transformer blocks before pooling; here pooled rows are given.
    Needs: labels, features of the student, logits of the teacher, a head.
    """

    def __init__(self, *, student_width: int, num_classes: int, eps: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.eps, self.temperature = positive("eps", eps), positive("temperature", temperature)
        self.head = nn.Linear(student_width, num_classes)

    def forward(
        self, student_features: Tensor, teacher_logits: Tensor, *, labels: Tensor, reduction: str = "batchmean"
    ) -> Tensor:
        student, teacher = prepare(linear(self.head, student_features), teacher_logits)
        true = F.one_hot(check_labels(labels, teacher), teacher.shape[1]).to(teacher.dtype)
        target = (log_probs(teacher, self.temperature).exp() + true) ** self.eps - true
        return reduce_rows(-(target * log_probs(student, self.temperature)).sum(1), reduction)


class SubclassHead(nn.Module):
    """LELP: T² KL(t || softmax(h(f_s)/T)) over C·S pseudo-subclasses, t_cs = softmax(v/T)_c · softmax_s(u_c / β).

    u_c = Q V_c (f_t - μ_c) / d_c: the teacher's row in the S leading principal directions V_c of its rows of class c,
    turned by a random rotation Q, so that in expectation all coordinates have the same variance, which d_c makes 1. The
    head h has C·S outputs; it tells apart what lies within the classes, where few logits say little.
    Loo et al. (arXiv 2409.20449), after the abstract and public reviews of the paper; its formulas and code were not
    available to us. Published: principal directions by class, a random rotation, a softmax with temperature β, one
    cross-entropy over S·C classes, no labels in the loss (CE weight 0), and that projecting the rows on the null space
    of the teacher's classifier first "often helps", which is not included.
    Assumed: the scale d_c, T = 4 and its factor T², S = 4, β = 1. Results of this class are not results of the paper.
    Deviation: the published student has the subclass head alone, whose probabilities are summed by class; the saved
    student here has its own head, which the cross-entropy trains.
    A class with fewer than two rows in `fit` has no directions; its target is spread evenly over its subclasses.
    Needs: features of both, logits of the teacher, `fit`, a head.
    """

    rotation: Tensor
    directions: Tensor
    offsets: Tensor

    def __init__(
        self,
        *,
        student_width: int,
        teacher_width: int,
        num_classes: int,
        subclasses: int = 4,
        sharpness: float = 1.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__()
        if at_least_one("subclasses", subclasses) > teacher_width:
            raise UsageError(f"subclasses must be at most the teacher's width, {teacher_width}, found {subclasses}")
        self.sharpness, self.temperature = positive("sharpness", sharpness), positive("temperature", temperature)
        self.head = nn.Linear(student_width, num_classes * subclasses)
        self.register_buffer("rotation", nn.init.orthogonal_(torch.empty(subclasses, subclasses)))
        self.register_buffer("directions", torch.full((num_classes, subclasses, teacher_width), math.nan))
        self.register_buffer("offsets", torch.full((num_classes, subclasses), math.nan))

    @torch.no_grad()
    def fit(self, teacher_features: Tensor, labels: Tensor) -> None:
        """The rotated principal directions of each class, scaled to unit variance, and the class means along them."""
        num_classes, count, width = self.directions.shape
        rotation = self.rotation.double()
        for c, rows in enumerate(rows_of_classes(teacher_features, labels, width, num_classes)):
            mean = rows.sum(0) / max(len(rows), 1)
            self.directions[c] = rotation @ principal_directions(rows - mean, count)
            self.offsets[c] = self.directions[c].double() @ mean

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        teacher_logits: Tensor,
        *,
        reduction: str = "batchmean",
    ) -> Tensor:
        _, teacher = prepare_features(student_features, teacher_features)
        refuse_unfitted(self.offsets)
        student = linear(self.head, student_features).reshape(len(teacher), *self.offsets.shape)
        _, logits = prepare(student[:, :, 0], teacher_logits)  # checks that they have the same classes
        log_within = F.log_softmax(self.coordinates(teacher) / self.sharpness, 2)
        log_t = log_probs(logits, self.temperature)[:, :, None] + log_within
        log_s = log_probs(student.flatten(1), self.temperature)
        return reduce_rows(self.temperature**2 * kl_rows(log_t.flatten(1), log_s), reduction)

    def coordinates(self, teacher: Tensor) -> Tensor:
        """u [batch, C, S]"""
        check_features("teacher", teacher, self.directions.shape[2])
        directions, offsets = self.directions.to(teacher.dtype), self.offsets.to(teacher.dtype)
        with full_precision(teacher):
            along = F.linear(teacher, directions.flatten(0, 1), -offsets.flatten())
        return along.reshape(len(teacher), *offsets.shape)


def principal_directions(centered: Tensor, count: int) -> Tensor:
    """[count, width]: the leading right singular vectors, times a factor that gives their coordinates mean variance 1.

    Of each vector, the component of largest size is positive. Directions in which the rows do not vary are 0.
    """
    directions = centered.new_zeros(count, centered.shape[1])
    if len(centered) < 2:
        return directions
    _, lengths, vectors = torch.linalg.svd(centered, full_matrices=False)
    found = int((lengths[:count] > 1e-6 * lengths[0]).sum())
    if found == 0:
        return directions
    vectors = vectors[:found]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    variance = lengths[:found].square().sum() / (len(centered) * count)
    directions[:found] = vectors * largest.sign() / variance.sqrt()
    return directions


class AdaptedTeacher(nn.Module):
    """PESF-KD: T² KL(softmax(v'/T) || softmax(z/T)) + CE(v', y), v' = v - a(f_t), a an adapter that trains as well.

    a: a linear layer to C, then a bottleneck C -> hidden -> C with ReLU. The gradient of both parts reaches it, so that
    the soft labels become smooth enough for the student and stay right; the cached rows do not change.
    Rao et al. (arXiv 2205.15308), after the authors' code, on penultimate features.
    Published: T = 6, hidden 32, weight 1 for each part, CE 1; the adapter has its own learning rate, 2e-5, beside 0.05.
    The code subtracts the adapter in training and adds it in validation; the sign means nothing before training. Its
    KL is the plain one only in a line that is commented out: the line in use mixes in logits with the true class
    swapped to the top, which the paper's abstract does not mention, and which is not included.
    Deviation: the adapter has the learning rate of the student; adapter_weight scales its own part, CE(v', y).
    Needs: labels, features and logits of the teacher, an adapter.
    """

    def __init__(
        self,
        *,
        teacher_width: int,
        num_classes: int,
        hidden: int = 32,
        adapter_weight: float = 1.0,
        temperature: float = 6.0,
    ) -> None:
        super().__init__()
        self.adapter_weight = non_negative("adapter_weight", adapter_weight)
        self.temperature = positive("temperature", temperature)
        self.first = nn.Linear(teacher_width, num_classes)
        self.down = nn.Linear(num_classes, at_least_one("hidden", hidden))
        self.up = nn.Linear(hidden, num_classes)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        teacher_features: Tensor,
        *,
        labels: Tensor,
        reduction: str = "batchmean",
    ) -> Tensor:
        student, teacher = prepare(student_logits, teacher_logits)
        labels = check_labels(labels, student)
        check_same_batch("student logits and teacher features", student, teacher_features)
        classes = linear(self.first, teacher_features.detach(), "teacher")
        adapted = teacher - linear(self.up, linear(self.down, classes).relu())
        log_t, log_s = log_probs(adapted, self.temperature), log_probs(student, self.temperature)
        own = F.cross_entropy(adapted, labels, reduction="none")
        return reduce_rows(self.temperature**2 * kl_rows(log_t, log_s) + self.adapter_weight * own, reduction)
