"""The power divergence, after REDistill: one family with all its limits and a closed-form gradient.

With p = softmax(v/T) of the teacher and q = softmax(z/T) of the student, the members of two of the three forms are one
function of one number k,
    D_k = 1/(k(k+1)) · (M - 1),   M = Σ p (p/q)^k = Σ w,   w = p^(1+k) q^(-k)          (Cressie-Read, teacher first)
    dD_k/dz = (q·M - w) / (T(1+k))
and form, order and lam only determine k:
    cressie-read, teacher first    k = lam            bounded, teacher first    k = -lam
    cressie-read, student first    k = -1 - lam       bounded, student first    k = lam - 1
k = 0 is KL(teacher || student), k = -1 is KL(student || teacher), k = -1/2 is 4(1 - Σ√(pq)), k = 1 is Pearson's χ²/2.
-1 < k < 0 is bounded by 1/|k(1+k)|; all others are unbounded.

The third form is the density power divergence of Basu et al. 1998, teacher first
    Σ [q^(1+lam) - (1 + 1/lam) p q^lam + p^(1+lam)/lam]

Where the student agrees with the teacher, M - 1 is a small difference of large numbers. The values are therefore summed
from terms that are 0 where p = q and positive elsewhere: with g_c(x) = expm1(cx)/c and x = log p - log q
    D_k = Σ [p·g_k(x) - (p - q)] / (1+k) = Σ [q·g_(1+k)(x) - (p - q)] / k
    D_density = (1+lam) · Σ [(p^(1+lam) - p q^lam)/lam - (p^(1+lam) - q^(1+lam))/(1+lam)]
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from redistill_cache.errors import Refused, UsageError
from torch import Tensor

from redistill.losses.checks import check_reduction, positive, prepare, reduce_rows
from redistill.specs import did_you_mean

__all__ = ["LARGEST_EXPONENT", "capped_fraction", "is_bounded", "may_be_capped", "power_divergence"]

Form = Literal["bounded", "cressie-read", "density"]
Order = Literal["teacher-first", "student-first"]
FORMS = ("bounded", "cressie-read", "density")
ORDERS = ("teacher-first", "student-first")

# The default cap on the exponent of unbounded members: a class may weigh at most 10,000 times more than under KL.
CAP = math.log(1e4)
# Fits float32 with room for the factors multiplied with it.
LARGEST_EXPONENT = 60.0
# The mean weight of rows that `calibrate` divides by is not below this: rows that no longer weigh anything stay so.
LEAST_WEIGHT = 1e-3
# Closer to k = -1 than this, the gradient in terms of w would lose digits in float32.
NEAR_REVERSE_KL = 0.2


def power_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lam: float = 2 / 3,
    temperature: float = 4.0,
    form: Form = "bounded",
    order: Order = "teacher-first",
    reduction: str = "batchmean",
    *,
    cap: float = CAP,
    scale_by_t2: bool = True,
    calibrate: bool = False,
) -> Tensor:
    """The power divergence between teacher and student; the default is the bounded form, after REDistill.

    With p = softmax(teacher/T) and q = softmax(student/T):
    bounded (default):  T²/(lam(1-lam)) · Σ p [1 - (q/p)^lam]
    cressie-read:       T²/(lam(lam+1)) · Σ p [(p/q)^lam - 1];  each is the other with the opposite sign of lam
    density:            T² · Σ [q^(1+lam) - (1 + 1/lam) p q^lam + p^(1+lam)/lam], lam >= 0 (Basu et al. 1998)
    student-first:      p and q exchanged
    All are KL at lam = 0 (student-first: reverse KL).

    Paper: REDistill (arXiv 2602.04677). Its displayed formula was not available to us, and the bounded form is not
    claimed to be it; docs/LOSSES.md has what speaks for each form. Defaults: lam = 2/3, temperature 4, times T², with
    which the gradient keeps its scale as T grows. Needs logits only. The teacher is a constant. Second derivatives
    (create_graph=True) are refused.

    cap applies to unbounded members other than KL and reverse KL: where the exponent lam·log(p/q) exceeds it, the
    exponential is continued by its tangent, so that value and gradient stay finite and the gradient never vanishes.
    math.inf turns it off as far as float32 allows; `capped_fraction` measures how often it applies.

    calibrate=True, which is ours and not the paper's, divides all rows by the mean of their weights M (LOSSES.md) over
    the batch; under KL it is 1. A row in which the two disagree still weighs less than the others of its batch, but the
    batch as a whole no longer weighs less while the student knows little. For members from KL to reverse KL.
    """
    check_member(lam, form, order)
    if calibrate and (form == "density" or may_be_capped(lam, form, order)):
        raise UsageError("calibrate=1 needs a member from KL to reverse KL: form=bounded with lam from 0 to 1")
    check_options(temperature, cap)
    check_reduction(reduction)
    student, teacher = prepare(student_logits, teacher_logits)
    scale = temperature * temperature if scale_by_t2 else 1.0
    member = lam, form, order, cap
    if torch.compiler.is_compiling():
        rows: Tensor = _Compiled.apply(student, teacher, member, temperature, scale)
    else:
        wants_gradient = torch.is_grad_enabled() and student.requires_grad
        rows = _Eager.apply(student, teacher, member, temperature, scale, wants_gradient)
    if calibrate:
        rows = rows / _mean_weight(student, teacher, cressie_read_power(lam, form, order), temperature)
    return reduce_rows(rows, reduction)


def _mean_weight(student: Tensor, teacher: Tensor, k: float, temperature: float) -> Tensor:
    """The mean over rows of M = Σ p^(1+k) q^(-k), for -1 <= k <= 0."""
    with torch.no_grad():
        log_q = torch.log_softmax(student / temperature, dim=1)
        log_p = torch.log_softmax(teacher / temperature, dim=1)
        weights = log_p.mul_(1.0 + k).sub_(log_q, alpha=k).exp_().sum(dim=1)
        return weights.mean().clamp_min(LEAST_WEIGHT)


def check_member(lam: float, form: str, order: str) -> None:
    """Refuse unknown forms and orders, and a lam for which the form is not defined."""
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r} of the power divergence; {did_you_mean(form, FORMS)}")
    if order not in ORDERS:
        raise UsageError(f"unknown order {order!r} of the power divergence; {did_you_mean(order, ORDERS)}")
    if not -math.inf < lam < math.inf:
        raise UsageError(f"lam must be a finite number, found {lam}")
    if form == "density" and lam < 0:
        raise UsageError(f"lam must be 0 or above for form=density, found {lam}")


def cressie_read_power(lam: float, form: str, order: str) -> float:
    """The k of the module docstring, of a member that is not of form density."""
    k = lam if form == "cressie-read" else -lam
    return k if order == "teacher-first" else -1.0 - k


def is_bounded(lam: float, form: Form = "bounded", order: Order = "teacher-first") -> bool:
    """Whether the member has an upper bound that holds for all logits."""
    check_member(lam, form, order)
    if form == "density":
        return lam > 0.0
    return -1.0 < cressie_read_power(lam, form, order) < 0.0


def may_be_capped(lam: float, form: Form = "bounded", order: Order = "teacher-first") -> bool:
    """Whether the cap can apply at all: beyond KL and beyond reverse KL."""
    check_member(lam, form, order)
    return form != "density" and not -1.0 <= cressie_read_power(lam, form, order) <= 0.0


def check_options(temperature: float, cap: float) -> None:
    positive("temperature", temperature)
    if not cap > 0.0:
        raise UsageError(f"cap must be positive (math.inf turns it off), found {cap}")


def capped_fraction(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lam: float = 2 / 3,
    temperature: float = 4.0,
    form: Form = "bounded",
    order: Order = "teacher-first",
    *,
    cap: float = CAP,
) -> Tensor:
    """The fraction of rows in which the cap of `power_divergence` applies to at least one class; 0 if it never can."""
    capped = may_be_capped(lam, form, order)
    check_options(temperature, cap)
    student, teacher = prepare(student_logits.detach(), teacher_logits)
    if not capped:
        return student.new_zeros(())
    k = cressie_read_power(lam, form, order)
    log_p, log_q = torch.log_softmax(teacher / temperature, 1), torch.log_softmax(student / temperature, 1)
    exponent = (log_p - log_q) * (k if k > 0 else 1.0 + k)
    return (exponent.amax(dim=1) > min(cap, LARGEST_EXPONENT)).to(student.dtype).mean()


# lam, form, order and cap, checked.
Member = tuple[float, str, str, float]


class _Eager(torch.autograd.Function):
    """Per-row values; the forward pass computes the gradient and saves it in one [batch, classes] buffer."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch's context object
        student: Tensor,
        teacher: Tensor,
        member: Member,
        temperature: float,
        scale: float,
        wants_gradient: bool,
    ) -> Tensor:
        log_q = torch.log_softmax(student / temperature, dim=1)
        log_p = torch.log_softmax(teacher / temperature, dim=1)
        rows, pull, total, q, divisor = _parts(log_p, log_q, member)
        if wants_gradient:
            ctx.save_for_backward(pull.addcmul_(q, total, value=-1.0))
            ctx.factor = scale / (divisor * temperature)
        return rows.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        # Gradients are recorded inside a backward pass only under create_graph=True. once_differentiable would allow
        # that, and silently leave this loss out of the second derivative.
        if torch.is_grad_enabled():
            raise Refused("the power divergence has no second derivative; call backward() without create_graph=True")
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_outputs[0] * ctx.factor).unsqueeze(1), None, None, None, None, None


class _Compiled(torch.autograd.Function):
    """The same for torch.compile, which fuses elementwise code: saves three numbers per row, recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        student: Tensor,
        teacher: Tensor,
        member: Member,
        temperature: float,
        scale: float,
    ) -> Tensor:
        z, v = student / temperature, teacher / temperature
        log_z, log_v = torch.logsumexp(z, 1, keepdim=True), torch.logsumexp(v, 1, keepdim=True)
        _, _, total, _, _ = _parts(v - log_v, z - log_z, member)
        # The value from other operations than the gradient: the compiler would find what they share, and store it.
        z, v = student * (1.0 / temperature), teacher * (1.0 / temperature)
        rows, _, _, _, _ = _parts(v - log_v, z - log_z, member)
        ctx.save_for_backward(student, teacher, log_z, log_v, total)
        ctx.options = member, temperature, scale
        return rows * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        student, teacher, log_z, log_v, total = ctx.saved_tensors
        member, temperature, scale = ctx.options
        _, pull, _, q, divisor = _parts(teacher / temperature - log_v, student / temperature - log_z, member)
        factor = grad_outputs[0].unsqueeze(1) * (scale / (divisor * temperature))
        return (pull - q * total) * factor, None, None, None, None


# Per-row values, pull, total, q, divisor: the gradient by the student's log-probabilities is pull / divisor up to a
# multiple of q; with total = Σ pull, the softmax makes it (pull - q·total) / divisor by the logits over T.
Parts = tuple[Tensor, Tensor, Tensor, Tensor, float]


def _parts(log_p: Tensor, log_q: Tensor, member: Member) -> Parts:
    """Value and gradient of a member; overwrites its inputs."""
    lam, form, order, cap = member
    if form == "density":
        return _density_parts(log_p, log_q, lam, order)
    return _cressie_read_parts(log_p, log_q, cressie_read_power(lam, form, order), cap)


def _cressie_read_parts(log_p: Tensor, log_q: Tensor, k: float, cap: float) -> Parts:
    """Any k, smooth through 0 and -1.

    Near KL (k >= -1/2) in the first form of the module docstring, near reverse KL in the second: g is exact where its
    own coefficient goes to 0, and the divisor stays away from 0. Above the cap g is replaced by its tangent.
    """
    near_kl = k >= -0.5
    c, divisor = (k, 1.0 + k) if near_kl else (1.0 + k, k)
    log_ratio = log_p - log_q
    below_cap, capped = log_ratio, k > 0.0 or k < -1.0
    if capped:
        end = min(cap, LARGEST_EXPONENT) / c
        below_cap = log_ratio.clamp(max=end) if c > 0.0 else log_ratio.clamp(min=end)
    w = torch.add(log_p if near_kl else log_q, below_cap, alpha=c).exp_()
    half, factor = _half_g(below_cap, c)
    beyond = w * (log_ratio - below_cap) if capped else None
    p, q, unit = log_p.exp_(), log_q.exp_(), _tanh(log_ratio.mul_(0.5))
    base = p if near_kl else q
    # base·g = (w + base)·half·factor and p - q = (p + q)·unit. The sum is written so that each probability occurs once:
    # a compiler then stores none of them.
    terms = q * unit if near_kl else p.mul_(unit)
    terms.addcmul_(base, unit.sub_(half, alpha=factor)).addcmul_(w, half, value=-factor)
    if beyond is not None:
        terms.sub_(beyond)
    rows = terms.sum(dim=1).div_(-divisor)
    if k > -1.0 + NEAR_REVERSE_KL:
        pull, divisor = w, -1.0 - k
    else:
        pull, divisor = half.mul_(w.add_(base)), -1.0 / factor
        if beyond is not None:
            pull.sub_(beyond, alpha=1.0 / (k * factor))
    return rows, pull, pull.sum(dim=1, keepdim=True), q, divisor


def _density_parts(log_p: Tensor, log_q: Tensor, lam: float, order: str) -> Parts:
    """lam >= 0, exact at 0. `first` is p in the formula and `second` q, or the reverse: order exchanges them."""
    teacher_first = order == "teacher-first"
    log_first, log_second = (log_p, log_q) if teacher_first else (log_q, log_p)
    log_ratio = log_first - log_second
    mixed = torch.add(log_first, log_second, alpha=lam).exp_()  # p·q^lam
    (half, factor), (whole, _) = _half_g(log_ratio, lam), _half_g(log_ratio, 1.0 + lam)
    q = log_q.exp()
    first, second = log_first.mul_(1.0 + lam).exp_(), log_second.mul_(1.0 + lam).exp_()
    rows = (first + mixed).mul_(half).mul_((1.0 + lam) * factor).sub_((first + second).mul_(whole)).sum(dim=1)
    if teacher_first:
        pull, factor = (second + mixed).mul_(_tanh(log_ratio.mul_(-0.5))), 1.0  # q^(1+lam) - p·q^lam
    else:
        pull = (first + mixed).mul_(half)
    return rows, pull, pull.sum(dim=1, keepdim=True), q, 1.0 / ((1.0 + lam) * factor)


def _half_g(x: Tensor, c: float) -> tuple[Tensor, float]:
    """tanh(cx/2) and the factor 1/c, or the limit x/2 and 1 at c = 0.

    They turn a difference into a sum times a small number, which loses no digits where x is small:
    a·g_c(x) = (a·e^(cx) - a)/c = (a·e^(cx) + a) · tanh(cx/2)/c.
    """
    return (_tanh(x * (0.5 * c)), 1.0 / c) if abs(c) > 1e-12 else (x * 0.5, 1.0)


def _tanh(x: Tensor) -> Tensor:
    """tanh, exact to the last digits near 0; overwrites x."""
    if not torch.compiler.is_compiling() or x.dtype == torch.float64:
        return x.tanh_()
    # Compiled for a CPU, this takes a third of the time of torch.tanh: a series near 0, exp elsewhere.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15)))
    return torch.where(square < 0.01, series, 1 - 2 / (1 + (2 * x).exp()))
