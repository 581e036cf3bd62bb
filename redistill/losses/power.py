"""The power divergence, after REDistill: one family with all its limits and a closed-form gradient.

All members are one function of one number k. With p = softmax(v/T) of the teacher, q = softmax(z/T) of the student,
    D_k = 1/(k(k+1)) · (M - 1),   M = Σ p (p/q)^k = Σ w,   w = p^(1+k) q^(-k)          (Cressie-Read, teacher first)
    dD_k/dz = (q·M - w) / (T(1+k))
and form, order and lam only determine k:
    cressie-read, teacher first    k = lam            bounded, teacher first    k = -lam
    cressie-read, student first    k = -1 - lam       bounded, student first    k = lam - 1
k = 0 is KL(teacher || student), k = -1 is KL(student || teacher), k = -1/2 is 4(1 - Σ√(pq)), k = 1 is Pearson's χ²/2.
-1 < k < 0 is bounded by 1/|k(1+k)|; all others are unbounded.
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

Form = Literal["bounded", "cressie-read"]
Order = Literal["teacher-first", "student-first"]
FORMS = ("bounded", "cressie-read")
ORDERS = ("teacher-first", "student-first")

# The default cap on the exponent of unbounded members: a class may weigh at most 10,000 times more than under KL.
CAP = math.log(1e4)
# Fits float32 with room for the factors multiplied with it. In a bounded member an exponent this large belongs to a
# probability below e^-120, which is 0, so that clamping here changes nothing.
LARGEST_EXPONENT = 60.0
# Closer to k = 0 and k = -1 than this, (M - 1)/(k(k+1)) would lose digits in float32, and expm1 is used instead.
NEAR_A_LIMIT = 0.2


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
) -> Tensor:
    """The power divergence between teacher and student; the default is the bounded form, after REDistill.

    With p = softmax(teacher/T) and q = softmax(student/T):
    bounded (default):  T²/(lam(1-lam)) · Σ p [1 - (q/p)^lam]
    cressie-read:       T²/(lam(lam+1)) · Σ p [(p/q)^lam - 1];  each is the other with the opposite sign of lam
    student-first:      p and q exchanged

    Paper: REDistill (arXiv 2602.04677). Its displayed formula was not available to us; docs/LOSSES.md explains the
    choice of the bounded form. Defaults: lam = 2/3, temperature 4, times T², with which the gradient keeps its scale
    as T grows. Needs logits only. The teacher is a constant. Second derivatives (create_graph=True) are refused.

    cap applies to unbounded members other than KL and reverse KL: where the exponent lam·log(p/q) exceeds it, the
    exponential is continued by its tangent, so that value and gradient stay finite and the gradient never vanishes.
    math.inf turns it off as far as float32 allows; `capped_fraction` measures how often it applies.
    """
    k = cressie_read_power(lam, form, order)
    check_options(temperature, cap)
    check_reduction(reduction)
    student, teacher = prepare(student_logits, teacher_logits)
    scale = temperature * temperature if scale_by_t2 else 1.0
    if torch.compiler.is_compiling():
        rows: Tensor = _Compiled.apply(student, teacher, k, temperature, cap, scale)
    else:
        wants_gradient = torch.is_grad_enabled() and student.requires_grad
        rows = _Eager.apply(student, teacher, k, temperature, cap, scale, wants_gradient)
    return reduce_rows(rows, reduction)


def cressie_read_power(lam: float, form: str, order: str) -> float:
    """The k of the module docstring; refuses unknown forms and orders."""
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r} of the power divergence; {did_you_mean(form, FORMS)}")
    if order not in ORDERS:
        raise UsageError(f"unknown order {order!r} of the power divergence; {did_you_mean(order, ORDERS)}")
    if not -math.inf < lam < math.inf:
        raise UsageError(f"lam must be a finite number, found {lam}")
    k = lam if form == "cressie-read" else -lam
    return k if order == "teacher-first" else -1.0 - k


def is_bounded(lam: float, form: Form = "bounded", order: Order = "teacher-first") -> bool:
    """Whether the member has an upper bound that holds for all logits."""
    return -1.0 < cressie_read_power(lam, form, order) < 0.0


def may_be_capped(lam: float, form: Form = "bounded", order: Order = "teacher-first") -> bool:
    """Whether the cap can apply at all: beyond KL and beyond reverse KL."""
    return not -1.0 <= cressie_read_power(lam, form, order) <= 0.0


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
    k = cressie_read_power(lam, form, order)
    check_options(temperature, cap)
    student, teacher = prepare(student_logits.detach(), teacher_logits)
    if -1.0 <= k <= 0.0:
        return student.new_zeros(())
    log_p, log_q = torch.log_softmax(teacher / temperature, 1), torch.log_softmax(student / temperature, 1)
    exponent = (log_p - log_q) * (k if k > 0 else 1.0 + k)
    return (exponent.amax(dim=1) > min(cap, LARGEST_EXPONENT)).to(student.dtype).mean()


class _Eager(torch.autograd.Function):
    """Per-row values; the forward pass computes the gradient and saves it in one [batch, classes] buffer."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch's context object
        student: Tensor,
        teacher: Tensor,
        k: float,
        temperature: float,
        cap: float,
        scale: float,
        wants_gradient: bool,
    ) -> Tensor:
        log_q = torch.log_softmax(student / temperature, dim=1)
        log_p = torch.log_softmax(teacher / temperature, dim=1)
        rows, pull, total, q, divisor = _parts(log_p, log_q, k, cap)
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
        return gradient * (grad_outputs[0] * ctx.factor).unsqueeze(1), None, None, None, None, None, None


class _Compiled(torch.autograd.Function):
    """The same for torch.compile, which fuses elementwise code: saves three numbers per row, recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        student: Tensor,
        teacher: Tensor,
        k: float,
        temperature: float,
        cap: float,
        scale: float,
    ) -> Tensor:
        z, v = student / temperature, teacher / temperature
        log_z, log_v = torch.logsumexp(z, 1, keepdim=True), torch.logsumexp(v, 1, keepdim=True)
        rows, _, total, _, _ = _parts(v - log_v, z - log_z, k, cap)
        ctx.save_for_backward(student, teacher, log_z, log_v, total)
        ctx.options = k, temperature, cap, scale
        return rows * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        student, teacher, log_z, log_v, total = ctx.saved_tensors
        k, temperature, cap, scale = ctx.options
        _, pull, _, q, divisor = _parts(teacher / temperature - log_v, student / temperature - log_z, k, cap)
        factor = grad_outputs[0].unsqueeze(1) * (scale / (divisor * temperature))
        return (pull - q * total) * factor, None, None, None, None, None


# Per-row values, pull, total, q, divisor: the gradient by the student's log-probabilities is pull / divisor up to a
# multiple of q; with total = Σ pull, the softmax makes it (pull - q·total) / divisor by the logits over T.
Parts = tuple[Tensor, Tensor, Tensor, Tensor, float]


def _parts(log_p: Tensor, log_q: Tensor, k: float, cap: float) -> Parts:
    """Value and gradient of member k; overwrites its inputs."""
    if -1.0 + NEAR_A_LIMIT <= k <= -NEAR_A_LIMIT:
        return _bounded_parts(log_p, log_q, k)
    return _general_parts(log_p, log_q, k, cap)


def _bounded_parts(log_p: Tensor, log_q: Tensor, k: float) -> Parts:
    """-1 < k < 0, not near either end: w = exp of a mean of two log-probabilities, at most 1."""
    w = log_p.lerp_(log_q, -k).exp_()
    mass = w.sum(dim=1, keepdim=True)
    rows = (mass.squeeze(1) - 1.0).div_(k * (1.0 + k))
    return rows, w.neg_(), mass.neg_(), log_q.exp_(), 1.0 + k


def _general_parts(log_p: Tensor, log_q: Tensor, k: float, cap: float) -> Parts:
    """Any k, smooth through 0 and -1.

    Near KL (k >= -1/2) the value is Σ p f(log p/q) / (1+k) with f(x) = expm1(kx)/k, near reverse KL it is
    Σ q f(log p/q) / k with f(x) = expm1((1+k)x)/(1+k): f is exact where its own coefficient goes to 0, and the other
    coefficient stays away from 0. Above the cap f is replaced by its tangent.
    """
    near_kl = k >= -0.5
    own, other = (k, 1.0 + k) if near_kl else (1.0 + k, k)
    base = log_p.exp() if near_kl else log_q.exp()
    value, slope = _relaxed_log(log_p.sub_(log_q), own, cap if k > 0.0 or k < -1.0 else None)
    rows = (base * value).sum(dim=1).div_(other)
    pull = slope.add_(1.0).mul_(base).neg_() if near_kl else value.sub_(slope).mul_(base)
    return rows, pull, pull.sum(dim=1, keepdim=True), log_q.exp_() if near_kl else base, other


def _relaxed_log(log_ratio: Tensor, c: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """f(x) = expm1(cx)/c, x at c = 0, and its slope minus one, expm1(cx); its tangent where cx exceeds the cap."""
    if abs(c) < 1e-12:
        return log_ratio, torch.zeros_like(log_ratio)
    exponent = log_ratio.mul_(c)
    limit = LARGEST_EXPONENT if cap is None else min(cap, LARGEST_EXPONENT)
    slope = exponent.clamp(max=limit).expm1_()
    if cap is None:
        return slope / c, slope
    beyond = exponent.sub_(limit).clamp_(min=0.0)
    return beyond.mul_(math.exp(limit) / c).add_(slope, alpha=1.0 / c), slope
