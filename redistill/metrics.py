"""How good a student is: accuracy, likelihood, calibration, and how far it follows its teacher.

    total = tally(logits, labels, teacher_logits)             # one batch; a frozen sum, nothing is kept of the logits
    total = total + tally(more_logits, more_labels, more_teacher_logits)
    total.metrics().to_json()

Tallies add in any order and over any split of the rows (loaders, processes, machines). A tally holds 4 bytes per row
(its confidence, signed by whether it was right) and 16 per class. All rates are fractions, 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from redistill_cache.errors import Refused, UsageError
from torch import Tensor
from torch.nn import functional as F

from redistill.losses.checks import at_least_one, check_labels, check_logits, check_matrix, positive

__all__ = [
    "BINS",
    "Bin",
    "Metrics",
    "Tally",
    "TeacherMetrics",
    "adaptive_ece",
    "ece",
    "evaluate",
    "reliability",
    "tally",
    "tally_all",
]


# -- calibration ------------------------------------------------------------------------------------------------------
#
# Is a confidence of 0.8 right 8 times in 10? Reliability tables and calibration errors.

BINS = 15


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: the rows whose confidence is in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float | None  # mean over the rows; None where there are none
    accuracy: float | None


def reliability(confidence: NDArray[Any], right: NDArray[np.bool_], *, bins: int = BINS) -> tuple[Bin, ...]:
    """The reliability table: equal-width bins (k/bins, (k+1)/bins] of the confidence, closed above."""
    at_least_one("bins", bins)
    wide = np.asarray(confidence, dtype=np.float64)
    place = np.clip(np.ceil(wide * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    confidences = np.bincount(place, weights=wide, minlength=bins)
    rights = np.bincount(place, weights=right, minlength=bins)
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
    """The same over bins of equal count (give or take one row), rows sorted by confidence, wrong before right."""
    at_least_one("bins", bins)
    order = np.lexsort((right, confidence))
    gap = right[order].astype(np.float64) - confidence[order].astype(np.float64)
    return float(sum(abs(part.sum()) for part in np.array_split(gap, bins)) / max(len(gap), 1))


# -- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherSums:
    """Sums over rows that need the teacher's logits."""

    temperature: float
    agree: int
    kl_t1: float
    kl: float
    right: int  # rows where the teacher is right
    student_right_where_right: int
    student_right_where_wrong: int
    agree_where_wrong: int

    def __add__(self, other: TeacherSums) -> TeacherSums:
        if self.temperature != other.temperature:
            raise UsageError(f"tallies at temperatures {self.temperature:g} and {other.temperature:g} do not add")
        summed = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "temperature"}
        return TeacherSums(temperature=self.temperature, **summed)


@dataclass(frozen=True)
class TeacherMetrics:
    """The student beside its teacher.

    kl_t1, kl: mean KL(teacher || student) at T = 1 and at `temperature`, without a factor T².
    copied: of the rows where the teacher is wrong, the share where the student gives the same wrong answer.
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
    """What a set of rows says about a student.

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
        """Plain JSON, the teacher's metrics beside the others ("agreement", "kl", ...)."""
        plain = asdict(self)
        return {**plain, **(plain.pop("teacher") or {})}


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over rows. Add tallies; ask for `metrics()` at the end."""

    top1: int
    top5: int
    nll: float
    brier: float
    class_rows: NDArray[np.int64]
    class_right: NDArray[np.int64]
    confidence: tuple[NDArray[np.float32], ...]  # pieces; negative where the row was wrong
    teacher: TeacherSums | None

    @property
    def rows(self) -> int:
        return sum(len(piece) for piece in self.confidence)

    def __add__(self, other: Tally) -> Tally:
        if len(self.class_rows) != len(other.class_rows):
            raise Refused(f"tallies of {len(self.class_rows)} and {len(other.class_rows)} classes do not add")
        if (self.teacher is None) != (other.teacher is None):
            raise UsageError("a tally with a teacher and one without do not add; give teacher logits to all or to none")
        both = self.teacher + other.teacher if self.teacher and other.teacher else None
        return Tally(
            top1=self.top1 + other.top1,
            top5=self.top5 + other.top5,
            nll=self.nll + other.nll,
            brier=self.brier + other.brier,
            class_rows=self.class_rows + other.class_rows,
            class_right=self.class_right + other.class_right,
            confidence=self.confidence + other.confidence,
            teacher=both,
        )

    def metrics(self, *, bins: int = BINS) -> Metrics:
        """The metrics of all rows so far."""
        signed = np.concatenate(self.confidence)
        confidence, right = np.abs(signed), signed > 0
        per_class = tuple(share(int(r), int(n)) for r, n in zip(self.class_right, self.class_rows, strict=True))
        return Metrics(
            rows=self.rows,
            top1=self.top1 / self.rows,
            top5=self.top5 / self.rows,
            nll=self.nll / self.rows,
            brier=self.brier / self.rows,
            ece=ece(confidence, right, bins=bins),
            adaptive_ece=adaptive_ece(confidence, right, bins=bins),
            teacher=beside_teacher(self.teacher, self.rows) if self.teacher else None,
            per_class=per_class,
            reliability=reliability(confidence, right, bins=bins),
        )


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def beside_teacher(sums: TeacherSums, rows: int) -> TeacherMetrics:
    wrong = rows - sums.right
    return TeacherMetrics(
        temperature=sums.temperature,
        teacher_top1=sums.right / rows,
        agreement=sums.agree / rows,
        kl_t1=sums.kl_t1 / rows,
        kl=sums.kl / rows,
        teacher_right_rows=sums.right,
        teacher_wrong_rows=wrong,
        top1_where_teacher_right=share(sums.student_right_where_right, sums.right),
        top1_where_teacher_wrong=share(sums.student_right_where_wrong, wrong),
        copied=share(sums.agree_where_wrong, wrong),
    )


@torch.no_grad()
def tally(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    temperature: float = 4.0,
) -> Tally:
    """Count one batch: student logits [batch, classes], labels [batch], and the teacher's logits where there are any.

    Ties go to the lower class, on every device. A row of the student that is not finite is refused.
    """
    check_matrix("student", logits)
    if teacher_logits is not None:
        check_logits(logits, teacher_logits)
    labels = check_labels(labels, logits)
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite().all(1)).sum())
        raise Refused(f"{bad} of {len(logits)} rows of the student are not finite; the training has diverged")
    log_p = log_softmax(logits)
    answer, true = first_best(logits), labels[:, None]
    right = answer == labels
    p = log_p.exp()
    brier = p.square().sum(1) - 2 * p.gather(1, true)[:, 0] + 1
    confidence = torch.where(right, 1.0, -1.0) * p.amax(1)
    return Tally(
        top1=int(right.sum()),
        top5=int((rank_of(logits, labels) < 5).sum()),
        nll=float(-log_p.gather(1, true).double().sum()),
        brier=float(brier.double().sum()),
        class_rows=counts(labels, logits.shape[1]),
        class_right=counts(labels[right], logits.shape[1]),
        confidence=(confidence.float().cpu().numpy(),),
        teacher=None if teacher_logits is None else sums_beside(logits, labels, teacher_logits, temperature),
    )


def tally_all(batches: Iterable[tuple[Tensor, Tensor, Tensor | None]], *, temperature: float = 4.0) -> Tally:
    """The sum of the tallies of (logits, labels, teacher logits or None) batches."""
    total: Tally | None = None
    for logits, labels, teacher_logits in batches:
        one = tally(logits, labels, teacher_logits, temperature=temperature)
        total = one if total is None else total + one
    if total is None:
        raise Refused("there is nothing to evaluate: not one batch came")
    return total


def evaluate(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, *, temperature: float = 4.0
) -> Metrics:
    """The metrics of logits that are all in memory."""
    return tally(logits, labels, teacher_logits, temperature=temperature).metrics()


def sums_beside(logits: Tensor, labels: Tensor, teacher_logits: Tensor, temperature: float) -> TeacherSums:
    temperature = positive("temperature", temperature)
    answer, teacher_answer = first_best(logits), first_best(teacher_logits)
    agree, right, teacher_right = answer == teacher_answer, answer == labels, teacher_answer == labels
    return TeacherSums(
        temperature=temperature,
        agree=int(agree.sum()),
        kl_t1=kl_sum(teacher_logits, logits, 1.0),
        kl=kl_sum(teacher_logits, logits, temperature),
        right=int(teacher_right.sum()),
        student_right_where_right=int((right & teacher_right).sum()),
        student_right_where_wrong=int((right & ~teacher_right).sum()),
        agree_where_wrong=int((agree & ~teacher_right).sum()),
    )


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide / temperature, dim=1)


def kl_sum(teacher_logits: Tensor, logits: Tensor, temperature: float) -> float:
    log_t, log_s = log_softmax(teacher_logits, temperature), log_softmax(logits, temperature)
    return float((log_t.exp() * (log_t - log_s)).sum(1).double().sum())


def first_best(logits: Tensor) -> Tensor:
    """The lowest class among the highest logits; torch's argmax does not promise which on an accelerator."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == logits.amax(1, keepdim=True), classes, logits.shape[1]).amin(1)


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one: higher logits, and equal ones with a lower index."""
    true = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > true) | ((logits == true) & before)).sum(1)


def counts(labels: Tensor, classes: int) -> NDArray[np.int64]:
    counted: NDArray[np.int64] = np.bincount(labels.cpu().numpy(), minlength=classes).astype(np.int64)
    return counted
