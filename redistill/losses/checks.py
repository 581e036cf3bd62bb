"""What every loss shares: one shape, one set of refusals, one meaning of `reduction`.

The shape of a loss
    def name(student_logits, teacher_logits, *, temperature=..., ..., reduction="batchmean") -> Tensor
    def name(student_logits, teacher_logits, *, labels, ..., reduction="batchmean") -> Tensor      where it needs labels

    * logits are [batch, classes], any floating dtype; labels are int64 [batch];
    * the first lines are `student, teacher = prepare(student_logits, teacher_logits)` (and `check_labels`): float32
      from there on, float64 kept; autocast does not lower anything after that, since softmax, log_softmax, exp, sum and
      elementwise operations are never autocast to half. Losses that use matmul wrap it in `full_precision(...)`;
    * the teacher is a constant: no gradient flows into `teacher_logits`;
    * `reduction="none"` gives one value per row, [batch]; losses over batch statistics, which have no value per row,
      call `check_reduction(reduction, per_row=False)` and refuse it;
    * options that a spec string may set are keyword arguments with a float, int, bool or str default.

A loss with parameters or state is an `nn.Module`: options in `__init__`, and
    forward(student_logits, teacher_logits, *, [labels,] progress: Progress, reduction="batchmean") -> Tensor
"""

from __future__ import annotations

import math

import torch
from redistill_cache.errors import Refused, UsageError
from torch import Tensor

from redistill.specs import did_you_mean

__all__ = [
    "REDUCTIONS",
    "at_least_one",
    "check_labels",
    "check_matrix",
    "check_reduction",
    "fraction",
    "full_precision",
    "positive",
    "prepare",
    "reduce_rows",
]


# -- options ----------------------------------------------------------------------------------------------------------
#
# Ranges of a loss's options: one line that names the option, what it may be, and what it was.


def positive(name: str, value: float) -> float:
    """A finite number above 0 (temperatures, exponents, weights that may not vanish)."""
    if not (0 < value < math.inf):
        raise UsageError(f"{name} must be a finite number above 0, found {value}")
    return value


def fraction(name: str, value: float) -> float:
    """A number in 0..1, both ends allowed."""
    if not (0 <= value <= 1):
        raise UsageError(f"{name} must be in 0..1, found {value}")
    return value


def at_least_one(name: str, value: int) -> int:
    """A count of at least 1."""
    if value < 1:
        raise UsageError(f"{name} must be at least 1, found {value}")
    return value


# -- checks -----------------------------------------------------------------------------------------------------------

# "mean" is the mean over rows, the same as "batchmean": a divergence has one value per row, and dividing it by the
# number of classes as well (what torch's kl_div does for "mean") is a well known trap.
REDUCTIONS = ("none", "sum", "mean", "batchmean")


def prepare(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits as [batch, classes] float32 (float64 stays), the teacher detached; refuses what does not fit."""
    check_logits(student_logits, teacher_logits)
    teacher = teacher_logits.detach()
    dtype = torch.promote_types(torch.float32, torch.promote_types(student_logits.dtype, teacher.dtype))
    return student_logits.to(dtype), teacher.to(dtype)


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse shapes, dtypes, devices and class counts that do not fit, and teacher rows that are not finite."""
    check_matrix("student", student_logits)
    check_matrix("teacher", teacher_logits)
    if student_logits.shape[1] != teacher_logits.shape[1]:
        raise Refused(
            f"the student has {student_logits.shape[1]} classes and the teacher {teacher_logits.shape[1]}; "
            "give the student as many outputs as the teacher has"
        )
    if student_logits.shape[0] != teacher_logits.shape[0]:
        raise UsageError(
            f"student and teacher logits must have the same number of rows, "
            f"found {student_logits.shape[0]} and {teacher_logits.shape[0]}"
        )
    if student_logits.device != teacher_logits.device:
        raise UsageError(f"student logits are on {student_logits.device}, teacher logits on {teacher_logits.device}")
    refuse_non_finite(teacher_logits)


def check_matrix(who: str, logits: Tensor) -> None:
    """Refuse logits that are not a floating point [batch, classes] with at least 1 row and 2 classes."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"{who} logits must be a floating point tensor, found {kind}")
    if logits.dim() != 2:
        raise UsageError(f"{who} logits must be [batch, classes], found shape {list(logits.shape)}")
    if logits.shape[0] < 1 or logits.shape[1] < 2:
        raise UsageError(f"{who} logits must have at least 1 row and 2 classes, found shape {list(logits.shape)}")


def refuse_non_finite(teacher_logits: Tensor) -> None:
    """On the CPU, a row with an inf or a NaN is refused by its index: it would turn the whole step into NaN."""
    if teacher_logits.device.type != "cpu" or torch.compiler.is_compiling():
        return  # asking would cost a synchronisation per step, or break the graph; the NaN then shows in the loss
    # The sum is finite only if all values are, and costs one read and no [batch, classes] temporary. The reverse does
    # not hold (a float16 sum may overflow), so the rows themselves have the last word.
    if math.isfinite(float(teacher_logits.detach().sum())):
        return
    bad = torch.nonzero(~teacher_logits.isfinite().all(dim=1)).flatten().tolist()
    if bad:
        raise Refused(
            f"{len(bad)} of {len(teacher_logits)} teacher rows are not finite, the first is row {bad[0]} of the batch"
        )


def check_labels(labels: Tensor | None, logits: Tensor) -> Tensor:
    """The labels as int64 [batch]; refuses missing labels, other shapes and dtypes. The range is checked on the CPU."""
    if labels is None:
        raise UsageError("this loss needs labels; pass labels=int64 tensor [batch]")
    if labels.dtype not in (torch.int64, torch.int32) or labels.shape != logits.shape[:1]:
        raise UsageError(
            f"labels must be an int64 tensor of shape [{logits.shape[0]}], found {labels.dtype} {list(labels.shape)}"
        )
    # On an accelerator the gather itself asserts the range; asking here would cost a synchronisation per step.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = labels.aminmax()
        if int(low) < 0 or int(high) >= logits.shape[1]:
            raise Refused(f"labels must be in 0..{logits.shape[1] - 1}, found {int(low)}..{int(high)}")
    return labels.long()


def check_reduction(reduction: str, *, per_row: bool = True) -> None:
    """Refuse an unknown reduction, and "none" where a loss has no value per row."""
    if reduction not in REDUCTIONS:
        raise UsageError(f"unknown reduction {reduction!r}; {did_you_mean(reduction, REDUCTIONS)}")
    if reduction == "none" and not per_row:
        raise UsageError("this loss is a statistic of the batch and has no value per row; use reduction='batchmean'")


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    """Per-row values [batch] as `reduction` says."""
    check_reduction(reduction)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.mean()


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which matmuls on the device of `tensor` are not lowered by an autocast around the loss."""
    return torch.autocast(tensor.device.type, enabled=False)
