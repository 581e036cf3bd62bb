"""The power divergence against oracles, identities, its limits and its own gradient."""

import math

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused, UsageError
from scipy import stats
from torch.nn import functional as F

from redistill.losses import capped_fraction, is_bounded, power_divergence
from redistill.losses.divergences import alpha_beta
from tests.random_logits import random_logits as logits

POWERS = (-2.5, -1.5, -1.0, -0.9, -2 / 3, -0.5, -0.25, -0.1, 0.0, 0.1, 1 / 3, 2 / 3, 1.0, 2.0)


def cressie_read(student, teacher, lam, **options):
    """Rows of the literal member, at temperature 1."""
    return power_divergence(student, teacher, lam, 1.0, "cressie-read", reduction="none", cap=math.inf, **options)


@pytest.mark.parametrize("lam", POWERS)
def test_equals_scipy_power_divergence(lam):
    student, teacher = logits()
    p, q = teacher.softmax(1).numpy(), student.softmax(1).numpy()
    # scipy's statistic is twice the divergence of the observed (teacher) from the expected (student) frequencies.
    expected = stats.power_divergence(p, q, axis=1, lambda_=lam).statistic / 2
    np.testing.assert_allclose(cressie_read(student, teacher, lam), expected, rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_lam_zero_is_kl_div_times_t_squared_with_its_gradient(temperature):
    student, teacher = logits()
    student.requires_grad_()
    kd = F.kl_div((student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean")
    (expected,) = torch.autograd.grad(kd * temperature**2, student)
    for form in ("bounded", "cressie-read"):
        loss = power_divergence(student, teacher, 0.0, temperature, form)
        torch.testing.assert_close(loss, kd * temperature**2)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected)


def test_default_is_the_bounded_form_with_two_thirds_at_temperature_four():
    student, teacher = logits()
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    expected = 16 * 4.5 * (p * (1 - (q / p) ** (2 / 3))).sum(1).mean()
    torch.testing.assert_close(power_divergence(student, teacher), expected)


@pytest.mark.parametrize("lam", POWERS)
def test_forms_differ_by_the_sign_of_lam_and_orders_by_the_roles(lam):
    student, teacher = logits()
    literal = cressie_read(student, teacher, lam)
    bounded = power_divergence(student, teacher, -lam, 1.0, "bounded", reduction="none", cap=math.inf)
    torch.testing.assert_close(bounded, literal)
    swapped = power_divergence(teacher, student, lam, 1.0, "cressie-read", "student-first", "none", cap=math.inf)
    torch.testing.assert_close(swapped, literal)
    # duality: exchanging the two distributions is lam -> -1 - lam
    torch.testing.assert_close(cressie_read(teacher, student, -1.0 - lam), literal)


@pytest.mark.parametrize("lam", POWERS)
def test_is_the_alpha_beta_divergence_with_one_plus_lam_and_minus_lam(lam):
    student, teacher = logits()
    ab = alpha_beta(student, teacher, alpha=1 + lam, beta=-lam, temperature=1.0, reduction="none")
    torch.testing.assert_close(cressie_read(student, teacher, lam), ab)


def test_named_members():
    student, teacher = logits()
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(cressie_read(student, teacher, 1.0), ((p - q) ** 2 / (2 * q)).sum(1))
    torch.testing.assert_close(cressie_read(student, teacher, -2.0), ((p - q) ** 2 / (2 * p)).sum(1))
    torch.testing.assert_close(cressie_read(student, teacher, -0.5), 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(1))
    torch.testing.assert_close(cressie_read(student, teacher, -1.0), (q * (q / p).log()).sum(1))


def test_agrees_with_the_values_of_two_outcomes_worked_by_hand():
    # P = (1/3, 2/3), Q = (q, 1 - q): the curves of the plot in docs/LOSSES.md
    teacher = torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64).log()
    table = {0.01: (0.905, 2.67, 0.519), 0.5: (0.0566, 0.0558, 0.0576), 0.9: (0.934, 1.380, 0.776)}
    for q, expected in table.items():
        student = torch.tensor([[q, 1 - q]], dtype=torch.float64).log()
        values = [cressie_read(student, teacher, lam).item() for lam in (0.0, 2 / 3, -0.5)]
        assert values == pytest.approx(expected, rel=6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [0.0, -1.0])
@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-14, -1e-3, -1e-6, -1e-9, -1e-14])
def test_limits_agree_with_their_neighbours(limit, step, dtype):
    student, teacher = logits(dtype=dtype)
    student.requires_grad_()
    at, near = cressie_read(student, teacher, limit), cressie_read(student, teacher, limit + step)
    tolerance = 20 * abs(step) + 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(near, at, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(rows.sum(), student)[0] for rows in (at, near)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("edge", [-0.2, -0.5, -0.8])
def test_the_branches_of_the_computation_agree_where_they_meet(edge):
    student, teacher = logits(dtype=torch.float32)
    student.requires_grad_()
    below, above = cressie_read(student, teacher, edge - 1e-7), cressie_read(student, teacher, edge + 1e-7)
    torch.testing.assert_close(below, above, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(
        torch.autograd.grad(below.sum(), student)[0], torch.autograd.grad(above.sum(), student)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("cap", [0.5, math.log(1e4), math.inf])
@pytest.mark.parametrize("temperature", [0.7, 4.0])
@pytest.mark.parametrize("lam", [*POWERS, 1e-6, -1 + 1e-6])
def test_gradient_is_the_derivative(lam, temperature, cap):
    student, teacher = logits(rows=3, classes=5)

    def rows(z):
        return power_divergence(z, teacher, lam, temperature, "cressie-read", reduction="none", cap=cap)

    assert torch.autograd.gradcheck(rows, student.requires_grad_())


@pytest.mark.parametrize("lam", POWERS)
@pytest.mark.parametrize("form", ["bounded", "cressie-read"])
@pytest.mark.parametrize("order", ["teacher-first", "student-first"])
def test_is_a_divergence(lam, form, order):
    student, teacher = logits(dtype=torch.float32)
    rows = power_divergence(student, teacher, lam, 1.0, form, order, "none")
    assert (rows > 0).all()
    student = teacher.clone().requires_grad_()
    same = power_divergence(student, teacher, lam, 1.0, form, order)
    assert same.item() == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(torch.autograd.grad(same, student)[0], torch.zeros_like(student), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", POWERS)
def test_shift_and_permutation_do_not_matter(lam):
    student, teacher = logits(dtype=torch.float32)
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(3))
    rows = cressie_read(student, teacher, lam)
    torch.testing.assert_close(cressie_read(student + 7, teacher - 3, lam), rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cressie_read(student[:, order], teacher[:, order], lam), rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_high_temperature_leaves_half_the_squared_distance_of_the_logits(temperature):
    # T² D_k -> mean squared difference of centred logits / 2 for every k: temperature washes lam out.
    student, teacher = logits()
    gap = teacher - student
    expected = 0.5 * (gap - gap.mean(1, keepdim=True)).square().mean(1)
    spread = [
        (power_divergence(student, teacher, lam, 1000 * temperature, reduction="none") / expected - 1).abs().max()
        for lam in (-2 / 3, 0.0, 2 / 3)
    ]
    assert max(spread) < 5e-3


# -- form=density -----------------------------------------------------------------------------------------------------


def density(student, teacher, lam, order="teacher-first"):
    return power_divergence(student, teacher, lam, 1.0, "density", order, reduction="none")


@pytest.mark.parametrize("lam", [0.1, 2 / 3, 1.0, 2.5])
def test_density_is_the_formula_of_basu_et_al(lam):
    student, teacher = logits()
    p, q = teacher.softmax(1).numpy(), student.softmax(1).numpy()
    expected = (q ** (1 + lam) - (1 + 1 / lam) * p * q**lam + p ** (1 + lam) / lam).sum(1)
    np.testing.assert_allclose(density(student, teacher, lam), expected, rtol=1e-9)
    np.testing.assert_allclose(density(teacher, student, lam, "student-first"), expected, rtol=1e-9)
    # the β-divergence is the member α = 1 of the alpha-beta family
    ab = alpha_beta(student, teacher, alpha=1.0, beta=lam, temperature=1.0, reduction="none")
    np.testing.assert_allclose(density(student, teacher, lam), (1 + lam) * ab, rtol=1e-9)


@pytest.mark.parametrize("order", ["teacher-first", "student-first"])
def test_density_is_kl_at_and_near_zero(order):
    student, teacher = logits()
    kl = power_divergence(student, teacher, 0.0, 1.0, "bounded", order, reduction="none")
    torch.testing.assert_close(density(student, teacher, 0.0, order), kl)
    torch.testing.assert_close(density(student, teacher, 1e-9, order), kl, rtol=1e-7, atol=0)


@pytest.mark.parametrize("order", ["teacher-first", "student-first"])
@pytest.mark.parametrize("lam", [0.0, 1e-6, 0.3, 2 / 3, 2.0])
def test_gradient_of_density_is_the_derivative(lam, order):
    student, teacher = logits(rows=3, classes=5)

    def rows(z):
        return power_divergence(z, teacher, lam, 1.7, "density", order, reduction="none")

    assert torch.autograd.gradcheck(rows, student.requires_grad_())


def test_density_is_bounded_has_no_cap_and_refuses_a_negative_lam():
    teacher = torch.tensor([[1e4, 0.0]])
    assert density(-teacher, teacher, 2 / 3).item() == pytest.approx(1 + 1.5)
    assert is_bounded(2 / 3, "density")
    assert not is_bounded(0.0, "density")
    assert capped_fraction(-teacher, teacher, 2 / 3, form="density", cap=0.01).item() == 0.0
    with pytest.raises(UsageError, match="lam must be 0 or above for form=density"):
        power_divergence(-teacher, teacher, -0.5, form="density")


def test_reductions_and_scale():
    student, teacher = logits()
    rows = power_divergence(student, teacher, reduction="none")
    assert rows.shape == (6,)
    torch.testing.assert_close(power_divergence(student, teacher, reduction="sum"), rows.sum())
    for reduction in ("mean", "batchmean"):
        torch.testing.assert_close(power_divergence(student, teacher, reduction=reduction), rows.mean())
    plain = power_divergence(student, teacher, reduction="none", scale_by_t2=False)
    torch.testing.assert_close(16 * plain, rows)


def test_reduction_none_gives_each_row_its_own_gradient():
    student, teacher = logits()
    student.requires_grad_()
    weights = torch.linspace(0, 1, 6, dtype=torch.float64)
    (weighted,) = torch.autograd.grad((weights * power_divergence(student, teacher, reduction="none")).sum(), student)
    (plain,) = torch.autograd.grad(power_divergence(student, teacher, reduction="sum"), student)
    torch.testing.assert_close(weighted, weights[:, None] * plain)


def test_backward_twice_over_one_graph_gives_the_same_gradient():
    student, teacher = logits()
    student.requires_grad_()
    loss = power_divergence(student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], first)


def test_a_second_derivative_is_refused_and_inputs_are_not_modified():
    student, teacher = logits(dtype=torch.float32)
    before = student.clone(), teacher.clone()
    student.requires_grad_()
    loss = power_divergence(student, teacher)
    with pytest.raises(Refused, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_teacher_is_a_constant():
    student, teacher = logits()
    teacher.requires_grad_()
    assert not power_divergence(student, teacher).requires_grad
    power_divergence(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(("k", "bounded"), [(2 / 3, True), (0.5, True), (0.0, False), (1.0, False), (-0.5, False)])
def test_bounded_members_stay_below_their_bound(k, bounded):
    assert is_bounded(k) is bounded
    teacher = torch.tensor([[1e4, 0.0, 0.0]])
    value = power_divergence(-teacher, teacher, k, 1.0, cap=math.inf).item()
    assert math.isfinite(value)
    bound = 1 / (k * (1 - k)) if bounded else 100.0
    assert value == pytest.approx(bound) if bounded else value > bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "bound"}, "did you mean bounded"),
        ({"order": "teacher"}, "did you mean teacher-first"),
        ({"reduction": "batch_mean"}, "did you mean batchmean"),
        ({"lam": math.nan}, "lam must be a finite number"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"cap": -1.0}, "cap must be positive"),
        ({"calibrate": True, "form": "cressie-read"}, "calibrate=1 needs a member from KL to reverse KL"),
        ({"calibrate": True, "form": "density"}, "calibrate=1 needs a member from KL to reverse KL"),
        ({"calibrate": True, "lam": 1.2}, "calibrate=1 needs a member from KL to reverse KL"),
    ],
)
def test_invalid_options_are_refused_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        power_divergence(*logits(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lam", [0.0, 1 / 3, 0.5, 2 / 3, 0.95, 1.0])
@pytest.mark.parametrize("order", ["teacher-first", "student-first"])
def test_calibration_divides_by_the_mean_weight_of_the_rows(lam, order):
    """Value and gradient; a row's weight, from float64 probabilities."""
    student, teacher = logits()
    student = student.requires_grad_()
    options = {"lam": lam, "temperature": 2.0, "order": order, "reduction": "none"}
    plain, calibrated = (power_divergence(student, teacher, calibrate=c, **options) for c in (False, True))
    p, q = (torch.softmax(z.detach().double() / 2, 1) for z in (teacher, student))
    p, q = (p, q) if order == "teacher-first" else (q, p)
    mean = (p ** (1 - lam) * q**lam).sum(1).mean().item()
    assert torch.allclose(calibrated * mean, plain, rtol=1e-5)
    grads = [torch.autograd.grad(rows.sum(), student)[0] for rows in (plain, calibrated)]
    assert torch.allclose(grads[1] * mean, grads[0], rtol=1e-5, atol=1e-9)


def test_calibration_leaves_kl_and_agreement_as_they_are_and_is_finite_for_any_logits():
    student, teacher = logits()
    kl = {"lam": 0.0, "temperature": 1.0}
    assert torch.allclose(
        power_divergence(student, teacher, **kl, calibrate=True), power_divergence(student, teacher, **kl), rtol=1e-6
    )
    assert power_divergence(teacher, teacher, calibrate=True).item() == 0.0
    extreme = torch.eye(4).mul(1e4).requires_grad_()  # no row weighs anything
    value = power_divergence(extreme, extreme.detach().roll(1, dims=1), temperature=1.0, calibrate=True)
    (gradient,) = torch.autograd.grad(value, extreme)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_capped_fraction_counts_rows_where_the_cap_applies():
    teacher = torch.tensor([[20.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 30.0]])
    student = torch.zeros(4, 2)
    student[0, 1] = 20.0
    options = {"lam": 2 / 3, "temperature": 1.0, "form": "cressie-read"}
    assert capped_fraction(student, teacher, **options).item() == 0.25
    assert capped_fraction(student, teacher, cap=0.1, **options).item() == 0.75
    assert capped_fraction(student, teacher, cap=math.inf, **options).item() == 0.0
    for lam in (0.0, 0.5, 2 / 3, 1.0):
        assert capped_fraction(student, teacher, lam, 1.0, cap=0.01).item() == 0.0


def test_the_loss_is_unchanged_below_the_cap_and_linear_above_it():
    # Two classes, the student's logit lower by x: above the cap the loss is linear in the log-ratio, not exponential.
    x = torch.linspace(2.0, 30.0, 15, dtype=torch.float64)
    student, teacher = torch.stack([-x, torch.zeros_like(x)], 1), torch.tensor([[12.0, 0.0]]).double().expand(15, 2)
    options = {"lam": 1.0, "temperature": 1.0, "form": "cressie-read", "reduction": "none"}
    capped, free = (power_divergence(student, teacher, cap=cap, **options) for cap in (10.0, math.inf))
    torch.testing.assert_close(capped[:3], free[:3])
    assert (capped[6:] < free[6:] / 10).all()
    slopes = capped[6:].diff()
    torch.testing.assert_close(slopes, slopes[:1].expand(8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("lam", [2 / 3, 0.5, 0.25, 0.05])
def test_the_cap_never_applies_to_the_bounded_form(lam):
    student, teacher = logits(spread=40.0)
    options = {"temperature": 0.3, "reduction": "none"}
    tight = power_divergence(student, teacher, lam, cap=1e-3, **options)
    assert torch.equal(tight, power_divergence(student, teacher, lam, cap=math.inf, **options))
