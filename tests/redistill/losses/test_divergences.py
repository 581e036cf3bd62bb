"""The plain divergences against slow formulas, identities, limits and extremes."""

import math

import pytest
import torch
from redistill_cache.errors import UsageError
from torch.nn import functional as F

from redistill.losses import divergences, hinton, power_divergence
from tests.random_logits import random_logits as logits

BOUNDS = {
    "hellinger": 4.0,
    "jensen_shannon": math.log(2.0),
    "skew_kl": math.log(10.0),
    "skew_reverse_kl": math.log(10.0),
    "total_variation": 1.0,
}
GRID = (-1.5, -0.5, 0.0, 0.04, 0.3, 0.8, 1.0, 2.0)


def rows_of(name, student, teacher, **options):
    return getattr(divergences, name)(student, teacher, **{"reduction": "none", **options})


def slow_kl(p, q):
    """KL of two rows of Python floats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mix(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


SLOW = {
    "kl": lambda p, q: slow_kl(p, q),
    "reverse_kl": lambda p, q: slow_kl(q, p),
    "hellinger": lambda p, q: 4 * (1 - sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))),
    "jensen_shannon": lambda p, q: 0.3 * slow_kl(p, mix(p, q, 0.3)) + 0.7 * slow_kl(q, mix(p, q, 0.3)),
    "skew_kl": lambda p, q: slow_kl(p, mix(p, q, 0.2)),
    "skew_reverse_kl": lambda p, q: slow_kl(q, mix(p, q, 0.8)),
    "total_variation": lambda p, q: 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
    "alpha_beta": lambda p, q: (
        -sum(a**0.8 * b**0.3 - 0.8 / 1.1 * a**1.1 - 0.3 / 1.1 * b**1.1 for a, b in zip(p, q, strict=True)) / (0.8 * 0.3)
    ),
}
OPTIONS = {"jensen_shannon": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.2}}
NAMES = list(SLOW)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_its_formula(name, temperature):
    student, teacher = logits()
    got = rows_of(name, student, teacher, temperature=temperature, scale_by_t2=True, **OPTIONS.get(name, {}))
    rows = zip((teacher / temperature).softmax(1).tolist(), (student / temperature).softmax(1).tolist(), strict=True)
    assert got.tolist() == pytest.approx([temperature**2 * SLOW[name](p, q) for p, q in rows], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_derivative(name):
    student, teacher = logits()
    assert torch.autograd.gradcheck(lambda z: rows_of(name, z, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_zero_at_the_teacher_positive_elsewhere_and_independent_of_shift_and_order(name):
    student, teacher = logits(dtype=torch.float32)
    rows = rows_of(name, student, teacher)
    assert (rows > 0).all()
    torch.testing.assert_close(rows_of(name, teacher, teacher), torch.zeros(6), rtol=0, atol=1e-5)
    order = torch.tensor([3, 0, 6, 2, 8, 5, 1, 7, 4])
    torch.testing.assert_close(rows_of(name, student[:, order] + 5, teacher[:, order] - 9), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 21_843])
def test_extremes_stay_finite_and_within_their_bound(name, classes):
    teacher = torch.zeros(2, classes)
    teacher[0, 0], teacher[1, :2] = 1e4, torch.tensor([-1e4, 1e4])
    student = -teacher
    student.requires_grad_()
    rows = rows_of(name, student, teacher, temperature=1.0)
    rows.sum().backward()
    assert rows.isfinite().all()
    assert student.grad.isfinite().all()
    assert (rows <= BOUNDS.get(name, math.inf) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_autocast_are_computed_in_float32(name):
    student, teacher = (x.bfloat16() for x in logits())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = rows_of(name, student, teacher)
    torch.testing.assert_close(rows, rows_of(name, student.float(), teacher.float()))


def test_kl_is_torch_kl_div():
    student, teacher = logits()
    expected = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
    torch.testing.assert_close(divergences.kl(student, teacher), expected)


def test_kd_and_kl_are_the_same_function():
    student, teacher = logits()
    student.requires_grad_()
    kd, kl = hinton.kd(student, teacher), divergences.kl(student, teacher)
    assert torch.equal(kd, kl)
    assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in (kd, kl)))


def test_skewing_goes_from_kl_to_zero():
    student, teacher = logits()
    for name, plain in (("skew_kl", "kl"), ("skew_reverse_kl", "reverse_kl")):
        whole = rows_of(plain, student, teacher, temperature=1.0)
        torch.testing.assert_close(rows_of(name, student, teacher, alpha=0.0), whole)
        torch.testing.assert_close(rows_of(name, student, teacher, alpha=1e-9), whole, rtol=1e-6, atol=1e-8)
        assert rows_of(name, student, teacher, alpha=0.999).max() < 1e-4


def test_jensen_shannon_is_symmetric_at_one_half_and_becomes_either_kl_at_its_ends():
    student, teacher = logits()
    torch.testing.assert_close(rows_of("jensen_shannon", student, teacher), rows_of("jensen_shannon", teacher, student))
    for beta, plain in ((1e-7, "kl"), (1 - 1e-7, "reverse_kl")):
        scaled = rows_of("jensen_shannon", student, teacher, beta=beta) / 1e-7
        torch.testing.assert_close(scaled, rows_of(plain, student, teacher, temperature=1.0), rtol=1e-4, atol=0)


def alpha_beta(student, teacher, alpha, beta):
    return rows_of("alpha_beta", student, teacher, alpha=alpha, beta=beta, temperature=1.0)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_alpha_beta_contains_kl_reverse_kl_and_hellinger(alpha, beta):
    student, teacher = logits()
    expected = power_divergence(student, teacher, beta, 1.0, reduction="none")
    torch.testing.assert_close(alpha_beta(student, teacher, alpha, beta), expected)


@pytest.mark.parametrize("alpha", GRID)
@pytest.mark.parametrize("beta", GRID)
def test_alpha_beta_limits_are_those_of_the_literature_and_neighbours_agree(alpha, beta):
    student, teacher = logits()
    at, log_p, log_q = alpha_beta(student, teacher, alpha, beta), teacher.log_softmax(1), student.log_softmax(1)
    p, q, total = log_p.exp(), log_q.exp(), alpha + beta
    if alpha == beta == 0:
        expected = 0.5 * (log_p - log_q) ** 2
    elif beta == 0:
        expected = (p**alpha * alpha * (log_p - log_q) - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        expected = (q**beta * beta * (log_q - log_p) - q**beta + p**beta) / beta**2
    elif total == 0:
        ratio = (q / p) ** alpha
        expected = (ratio.log() + 1 / ratio - 1) / alpha**2
    else:
        expected = -(p**alpha * q**beta - alpha / total * p**total - beta / total * q**total) / (alpha * beta)
    torch.testing.assert_close(at, expected.sum(1), rtol=1e-8, atol=1e-10)
    near = alpha_beta(student, teacher, alpha + 1e-7, beta - 3e-8)
    torch.testing.assert_close(near, at, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), [(1e-3, 2e-3), (0.03, -0.01), (1e-8, 0.9), (0.7, 1e-5), (0.4, -0.4)])
def test_alpha_beta_is_accurate_in_float32(alpha, beta):
    student, teacher = logits()
    exact = alpha_beta(student, teacher, alpha, beta)
    torch.testing.assert_close(
        alpha_beta(student.float(), teacher.float(), alpha, beta).double(), exact, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jensen_shannon", {"beta": 0.0}, "beta must lie strictly between 0 and 1"),
        ("skew_kl", {"alpha": 1.0}, "alpha must be at least 0 and below 1"),
        ("skew_reverse_kl", {"alpha": -0.1}, "alpha must be at least 0 and below 1"),
        ("alpha_beta", {"alpha": math.inf}, "alpha and beta must be finite"),
        ("total_variation", {"temperature": 0.0}, "temperature must be"),
        ("skew_kl", {"reduction": "summ"}, "did you mean sum"),
    ],
)
def test_invalid_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        rows_of(name, *logits(), **options)
