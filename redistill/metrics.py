"""Metrics of a student: accuracy, likelihood, calibration, and agreement with the teacher.

    total = batch_sums(logits, labels, teacher_logits)             # sums over one batch; no logits are stored
    total = total + batch_sums(more_logits, more_labels, more_teacher_logits)
    total.metrics().to_json()

Sums add in any order and over any split of the rows (loaders, processes, machines). They hold 4 bytes per row (its
confidence, negative if the prediction was wrong) and 16 per class. All rates are fractions, 0..1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from redistill_cache.errors import Refused, UsageError
from torch import Tensor

from redistill.losses.checks import at_least_one, check_labels, check_logits, check_matrix, positive
from redistill.losses.divergences import kl_rows, log_probs

__all__ = [
    "BINS",
    "AgreementSums",
    "Bin",
    "MetricSums",
    "Metrics",
    "TeacherMetrics",
    "adaptive_ece",
    "batch_sums",
    "ece",
    "reliability",
]

BINS = 15


# -- metrics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: the rows whose confidence is in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float | None  # mean over the rows; None without rows
    accuracy: float | None


@dataclass(frozen=True)
class TeacherMetrics:
    """Agreement with the teacher.

    kl_t1, kl: mean KL(teacher || student) at T = 1 and at `temperature`, without a factor T².
    copied: the share of the rows with a wrong teacher for which the student predicts the same wrong class.
    """

    temperature: float
    teacher_top1: float
    agreement: float
    kl_t1: float
    kl: float
    teacher_right_rows: int
    teacher_wrong_rows: int
    top1_where_teacher_right: float | None
    top1_where_teacher_wrong: float | None
    copied: float | None


@dataclass(frozen=True)
class Metrics:
    """The metrics of a student over a set of rows.

    nll: mean -log p_y. brier: mean over rows of the sum over classes of (p - y)², 0..2.
    ece: expected calibration error over 15 equal-width bins of the confidence; adaptive_ece: 15 bins of equal count.
    per_class: accuracy by true class, None for a class without rows.
    """

    rows: int
    top1: float
    top5: float
    nll: float
    brier: float
    ece: float
    adaptive_ece: float
    teacher: TeacherMetrics | None
    per_class: tuple[float | None, ...]
    reliability: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the teacher's metrics ("agreement", "kl", ...) at the top level."""
        plain = asdict(self)
        return {**plain, **(plain.pop("teacher") or {})}


# -- sums -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgreementSums:
    """Sums over rows for `TeacherMetrics`."""

    temperature: float
    agree: int
    kl_t1: float
    kl: float
    teacher_right: int
    right_where_teacher_right: int
    right_where_teacher_wrong: int
    agree_where_teacher_wrong: int

    def __add__(self, other: AgreementSums) -> AgreementSums:
        if self.temperature != other.temperature:
            raise UsageError(f"cannot add sums at temperatures {self.temperature:g} and {other.temperature:g}")
        summed = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "temperature"}
        return AgreementSums(temperature=self.temperature, **summed)

    def metrics(self, rows: int) -> TeacherMetrics:
        teacher_wrong = rows - self.teacher_right
        return TeacherMetrics(
            temperature=self.temperature,
            teacher_top1=self.teacher_right / rows,
            agreement=self.agree / rows,
            kl_t1=self.kl_t1 / rows,
            kl=self.kl / rows,
            teacher_right_rows=self.teacher_right,
            teacher_wrong_rows=teacher_wrong,
            top1_where_teacher_right=ratio(self.right_where_teacher_right, self.teacher_right),
            top1_where_teacher_wrong=ratio(self.right_where_teacher_wrong, teacher_wrong),
            copied=ratio(self.agree_where_teacher_wrong, teacher_wrong),
        )


@dataclass(frozen=True, eq=False)
class MetricSums:
    """Sums over rows for `Metrics`: add those of all batches, then call `metrics()`."""

    top1: int
    top5: int
    nll: float
    brier: float
    class_rows: NDArray[np.int64]
    class_right: NDArray[np.int64]
    confidence: tuple[NDArray[np.float32], ...]  # one array per batch; negative where the prediction was wrong
    teacher: AgreementSums | None

    @property
    def rows(self) -> int:
        return sum(len(part) for part in self.confidence)

    def __add__(self, other: MetricSums) -> MetricSums:
        if len(self.class_rows) != len(other.class_rows):
            raise Refused(f"cannot add sums over {len(self.class_rows)} and {len(other.class_rows)} classes")
        if (self.teacher is None) != (other.teacher is None):
            raise UsageError("cannot add sums with and without teacher logits; pass them for all batches or for none")
        return MetricSums(
            top1=self.top1 + other.top1,
            top5=self.top5 + other.top5,
            nll=self.nll + other.nll,
            brier=self.brier + other.brier,
            class_rows=self.class_rows + other.class_rows,
            class_right=self.class_right + other.class_right,
            confidence=self.confidence + other.confidence,
            teacher=self.teacher + other.teacher if self.teacher and other.teacher else None,
        )

    def metrics(self, *, bins: int = BINS) -> Metrics:
        signed = np.concatenate(self.confidence)
        confidence, right = np.abs(signed), signed > 0
        return Metrics(
            rows=self.rows,
            top1=self.top1 / self.rows,
            top5=self.top5 / self.rows,
            nll=self.nll / self.rows,
            brier=self.brier / self.rows,
            ece=ece(confidence, right, bins=bins),
            adaptive_ece=adaptive_ece(confidence, right, bins=bins),
            teacher=self.teacher.metrics(self.rows) if self.teacher else None,
            per_class=tuple(ratio(int(r), int(n)) for r, n in zip(self.class_right, self.class_rows, strict=True)),
            reliability=reliability(confidence, right, bins=bins),
        )


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@torch.no_grad()
def batch_sums(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    temperature: float = 4.0,
) -> MetricSums:
    """The sums over one batch of student logits [batch, classes], labels [batch] and, if any, the teacher's logits.

    Ties are broken by the lower class, on every device. Student rows that are not finite are refused.
    """
    check_matrix("student", logits)
    if teacher_logits is not None:
        check_logits(logits, teacher_logits)
    labels = check_labels(labels, logits)
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite().all(1)).sum())
        raise Refused(f"{bad} of {len(logits)} rows of the student are not finite; the training has diverged")
    log_p, true = log_probs(widened(logits)), labels[:, None]
    right = predictions(logits) == labels
    p = log_p.exp()
    brier = p.square().sum(1) - 2 * p.gather(1, true)[:, 0] + 1
    confidence = torch.where(right, 1.0, -1.0) * p.amax(1)
    return MetricSums(
        top1=int(right.sum()),
        top5=int((rank_of_label(logits, labels) < 5).sum()),
        nll=total(-log_p.gather(1, true)),
        brier=total(brier),
        class_rows=class_counts(labels, logits.shape[1]),
        class_right=class_counts(labels[right], logits.shape[1]),
        confidence=(confidence.float().cpu().numpy(),),
        teacher=None if teacher_logits is None else agreement_sums(logits, labels, teacher_logits, temperature),
    )


def agreement_sums(logits: Tensor, labels: Tensor, teacher_logits: Tensor, temperature: float) -> AgreementSums:
    temperature = positive("temperature", temperature)
    student, teacher = predictions(logits), predictions(teacher_logits)
    agree, right, teacher_right = student == teacher, student == labels, teacher == labels
    return AgreementSums(
        temperature=temperature,
        agree=int(agree.sum()),
        kl_t1=kl_sum(teacher_logits, logits, 1.0),
        kl=kl_sum(teacher_logits, logits, temperature),
        teacher_right=int(teacher_right.sum()),
        right_where_teacher_right=int((right & teacher_right).sum()),
        right_where_teacher_wrong=int((right & ~teacher_right).sum()),
        agree_where_teacher_wrong=int((agree & ~teacher_right).sum()),
    )


def total(rows: Tensor) -> float:
    """The sum in float64, which MPS does not have."""
    return float((rows.cpu() if rows.device.type == "mps" else rows).double().sum())


def widened(logits: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def kl_sum(teacher_logits: Tensor, logits: Tensor, temperature: float) -> float:
    rows = kl_rows(log_probs(widened(teacher_logits), temperature), log_probs(widened(logits), temperature))
    return total(rows)


def predictions(logits: Tensor) -> Tensor:
    """The lowest class with the highest logit; on an accelerator torch's argmax may return any of them."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == logits.amax(1, keepdim=True), classes, logits.shape[1]).amin(1)


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of classes ranked before the true one: higher logits, and equal ones with a lower index."""
    true = logits.gather(1, labels[:, None])
    lower_index = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > true) | ((logits == true) & lower_index)).sum(1)


def class_counts(labels: Tensor, classes: int) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.bincount(labels.cpu().numpy(), minlength=classes).astype(np.int64)
    return counts


# -- calibration ------------------------------------------------------------------------------------------------------


def reliability(confidence: NDArray[Any], right: NDArray[np.bool_], *, bins: int = BINS) -> tuple[Bin, ...]:
    """The reliability diagram: equal-width bins (k/bins, (k+1)/bins] of the confidence."""
    at_least_one("bins", bins)
    wide = np.asarray(confidence, dtype=np.float64)
    index = np.clip(np.ceil(wide * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = np.bincount(index, minlength=bins)
    confidences = np.bincount(index, weights=wide, minlength=bins)
    rights = np.bincount(index, weights=right, minlength=bins)
    return tuple(
        Bin(k / bins, (k + 1) / bins, int(n), float(c / n) if n else None, float(r / n) if n else None)
        for k, (n, c, r) in enumerate(zip(rows, confidences, rights, strict=True))
    )


def ece(confidence: NDArray[Any], right: NDArray[np.bool_], *, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017): mean over rows of |accuracy - confidence| of the row's bin."""
    table = reliability(confidence, right, bins=bins)
    gaps = (
        b.rows * abs(b.accuracy - b.confidence) for b in table if b.accuracy is not None and b.confidence is not None
    )
    return sum(gaps) / max(len(confidence), 1)


def adaptive_ece(confidence: NDArray[Any], right: NDArray[np.bool_], *, bins: int = BINS) -> float:
    """The same over bins of equal count (up to one row), rows sorted by confidence, wrong before right."""
    at_least_one("bins", bins)
    order = np.lexsort((right, confidence))
    gap = right[order].astype(np.float64) - confidence[order].astype(np.float64)
    return float(sum(abs(part.sum()) for part in np.array_split(gap, bins)) / max(len(gap), 1))
