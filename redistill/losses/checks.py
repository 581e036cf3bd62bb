"""What all losses share: one signature, one set of checks, one meaning of `reduction`.

The signature of a loss
    def name(student_logits, teacher_logits, *, temperature=..., ..., reduction="batchmean") -> Tensor
    def name(student_logits, teacher_logits, *, labels, ..., reduction="batchmean") -> Tensor      if it needs labels

    * logits are [batch, classes], any floating dtype; labels are int64 [batch];
    * the first lines are `student, teacher = prepare(student_logits, teacher_logits)` (and `check_labels`): float32
      from there on, float64 stays float64. Autocast lowers nothing after that, since it never casts softmax,
      log_softmax, exp, sum and elementwise operations to half. Losses that use matmul wrap it in `full_precision(...)`;
    * the teacher is a constant: no gradient flows into `teacher_logits`;
    * `reduction="none"` returns one value per row, [batch]; losses over batch statistics, which have no value per row,
      call `check_reduction(reduction, per_row=False)` and refuse it;
    * options that a spec string may set are keyword arguments with a float, int, bool or str default.

A loss with parameters or state is an `nn.Module`: options in `__init__`, and
    forward(student_logits, teacher_logits, *, [labels,] progress: TrainingProgress, reduction="batchmean") -> Tensor

A loss on features takes, by name, what it needs of student_logits, teacher_logits, student_features, teacher_features
([batch, width], one layer of each network) and labels. A module takes its sizes as student_width, teacher_width and
num_classes, keyword arguments without default. A module that must see the teacher's rows before training has
`fit(teacher_features, labels)`; what it computes are buffers, NaN until then. Matmuls with parameters are `linear`.
"""

from __future__ import annotations

import math

import torch
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.specs import did_you_mean

__all__ = [
    "REDUCTIONS",
    "at_least_one",
    "check_classes",
    "check_features",
    "check_labels",
    "check_logits",
    "check_matrix",
    "check_reduction",
    "fraction",
    "full_precision",
    "linear",
    "non_negative",
    "one_of",
    "positive",
    "prepare",
    "prepare_features",
    "reduce_batch",
    "reduce_rows",
    "refuse_unfitted",
    "rows_of_classes",
]

# "mean" is the mean over rows, the same as "batchmean": a divergence has one value per row, and dividing it by the
# number of classes as well (what torch's kl_div does for "mean") is a well known trap.
REDUCTIONS = ("none", "sum", "mean", "batchmean")


# -- logits and labels ------------------------------------------------------------------------------------------------


def prepare(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits, checked, as [batch, classes] float32 (float64 stays); the teacher's are detached."""
    check_logits(student_logits, teacher_logits)
    return at_full_precision(student_logits, teacher_logits)


def at_full_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 (float64 stays); the teacher's are detached."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(student.dtype, teacher.dtype))
    return student.to(dtype), teacher.detach().to(dtype)


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse shapes, dtypes, devices and class counts that do not match, and teacher rows that are not finite."""
    check_matrix("student", student_logits)
    check_matrix("teacher", teacher_logits)
    if student_logits.shape[1] != teacher_logits.shape[1]:
        raise Refused(
            f"the student has {student_logits.shape[1]} classes and the teacher {teacher_logits.shape[1]}; "
            "give the student as many outputs as the teacher has"
        )
    check_same_batch("student and teacher logits", student_logits, teacher_logits)
    refuse_non_finite(teacher_logits)


def check_same_batch(what: str, first: Tensor, second: Tensor) -> None:
    """Refuse another number of rows or another device."""
    if first.shape[0] != second.shape[0]:
        raise UsageError(f"{what} must have the same number of rows, found {first.shape[0]} and {second.shape[0]}")
    if first.device != second.device:
        raise UsageError(f"{what} must be on the same device, found {first.device} and {second.device}")


def check_matrix(side: str, logits: Tensor) -> None:
    """Refuse logits that are not a floating point [batch, classes] with at least 1 row and 2 classes."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"{side} logits must be a floating point tensor, found {kind}")
    if logits.dim() != 2:
        raise UsageError(f"{side} logits must be [batch, classes], found shape {list(logits.shape)}")
    if logits.shape[0] < 1 or logits.shape[1] < 2:
        raise UsageError(f"{side} logits must have at least 1 row and 2 classes, found shape {list(logits.shape)}")


def refuse_non_finite(teacher_rows: Tensor) -> None:
    """On the CPU, refuse a row with inf or NaN by its index: it would turn the whole step into NaN."""
    if teacher_rows.device.type != "cpu" or torch.compiler.is_compiling():
        return  # the check would cost a synchronisation per step, or break the graph; the loss then shows the NaN
    # The sum is finite only if all values are, and costs one read and no [batch, classes] temporary. The reverse does
    # not hold (a float16 sum may overflow), so the rows are checked as well.
    if math.isfinite(float(teacher_rows.detach().sum())):
        return
    bad = torch.nonzero(~teacher_rows.isfinite().all(dim=1)).flatten().tolist()
    if bad:
        raise Refused(
            f"{len(bad)} of {len(teacher_rows)} teacher rows are not finite, the first is row {bad[0]} of the batch"
        )


def check_labels(labels: Tensor | None, logits: Tensor) -> Tensor:
    """The labels as int64 [batch]; refuses missing labels, other shapes and dtypes. The range is checked on the CPU."""
    return check_classes(labels, logits.shape[0], logits.shape[1])


def check_classes(labels: Tensor | None, rows: int, num_classes: int) -> Tensor:
    """The same for a loss without logits."""
    if labels is None:
        raise UsageError("this loss needs labels; pass labels=int64 tensor [batch]")
    if labels.dtype not in (torch.int64, torch.int32) or labels.shape != (rows,):
        raise UsageError(f"labels must be an int64 tensor of shape [{rows}], found {labels.dtype} {list(labels.shape)}")
    # On an accelerator the gather asserts the range; a check would cost a synchronisation per step.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = labels.aminmax()
        if int(low) < 0 or int(high) >= num_classes:
            raise Refused(f"labels must be in 0..{num_classes - 1}, found {int(low)}..{int(high)}")
    return labels.long()


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which an enclosing autocast does not lower matmuls on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)


# -- features ---------------------------------------------------------------------------------------------------------


def prepare_features(student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both features, checked, as [batch, width] float32 (float64 stays); the teacher's are detached."""
    check_features("student", student_features)
    check_features("teacher", teacher_features)
    check_same_batch("student and teacher features", student_features, teacher_features)
    refuse_non_finite(teacher_features)
    return at_full_precision(student_features, teacher_features)


def check_features(side: str, features: Tensor, width: int | None = None) -> None:
    """Refuse features that are not a floating point [batch, width] with at least 1 row, or have another width."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"{side} features must be a floating point tensor, found {kind}")
    if features.dim() != 2 or features.shape[0] < 1:
        raise UsageError(f"{side} features must be [batch, width], found shape {list(features.shape)}")
    if width is not None and features.shape[1] != width:
        raise UsageError(f"expected {side} features of width {width}, found {features.shape[1]}")


def linear(layer: nn.Linear, features: Tensor, side: str = "student") -> Tensor:
    """The layer on features, in float32 (float64 stays) also under autocast."""
    check_features(side, features, layer.in_features)
    rows = features.to(torch.promote_types(torch.float32, features.dtype))
    bias = None if layer.bias is None else layer.bias.to(rows.dtype)
    with full_precision(rows):
        return F.linear(rows, layer.weight.to(rows.dtype), bias)


def rows_of_classes(teacher_features: Tensor, labels: Tensor, width: int, num_classes: int) -> list[Tensor]:
    """The rows of each class, in their order: float64 [n_c, width] for c = 0..num_classes - 1."""
    check_features("teacher", teacher_features, width)
    refuse_non_finite(teacher_features.cpu())
    labels = check_classes(labels.cpu(), len(teacher_features), num_classes)
    counts = labels.bincount(minlength=num_classes).tolist()
    return [teacher_features[chosen].double() for chosen in torch.split(labels.argsort(stable=True), counts)]


def refuse_unfitted(buffer: Tensor) -> None:
    """On the CPU, refuse a loss that has not seen the teacher's rows; elsewhere its value is NaN, without a check."""
    if buffer.device.type == "cpu" and not torch.compiler.is_compiling() and math.isnan(float(buffer.flatten()[0])):
        raise UsageError("this loss must see the teacher's features first; call fit(teacher_features, labels)")


# -- options ----------------------------------------------------------------------------------------------------------


def positive(name: str, value: float) -> float:
    """A finite number above 0 (temperatures, exponents, weights that must not vanish)."""
    if not (0 < value < math.inf):
        raise UsageError(f"{name} must be a finite number above 0, found {value}")
    return value


def non_negative(name: str, value: float) -> float:
    """A finite number of at least 0 (weights)."""
    if not (0 <= value < math.inf):
        raise UsageError(f"{name} must be a finite number, 0 or above, found {value}")
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


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """One of the known words."""
    if value not in choices:
        raise UsageError(f"unknown {name} {value!r}; {did_you_mean(value, choices)}")
    return value


# -- reduction --------------------------------------------------------------------------------------------------------


def check_reduction(reduction: str, *, per_row: bool = True) -> None:
    """Refuse an unknown reduction, and "none" for a loss without a value per row."""
    if reduction not in REDUCTIONS:
        raise UsageError(f"unknown reduction {reduction!r}; {did_you_mean(reduction, REDUCTIONS)}")
    if reduction == "none" and not per_row:
        raise UsageError("this loss is a statistic of the batch and has no value per row; use reduction='batchmean'")


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    """Reduce per-row values [batch]."""
    check_reduction(reduction)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.mean()


def reduce_batch(value: Tensor, rows: Tensor, reduction: str) -> Tensor:
    """Reduce a statistic of the batch; "sum" is the value times the number of rows, as for per-row losses."""
    return value * rows.shape[0] if reduction == "sum" else value
