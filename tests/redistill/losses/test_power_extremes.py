"""The power divergence at numerical extremes: huge logits, one-hot rows, 21,843 classes, half precision, compile."""

import math

import pytest
import torch
from redistill_cache.errors import Refused, UsageError

from redistill.losses import power_divergence

MEMBERS = [
    (lam, form, order)
    for lam in (-1.0, -2 / 3, 0.0, 1e-6, 0.1, 0.5, 2 / 3, 1.0, 2.0)
    for form in ("bounded", "cressie-read")
    for order in ("teacher-first", "student-first")
]
DENSITIES = [(lam, "density", order) for lam in (0.0, 1e-6, 2 / 3, 3.0) for order in ("teacher-first", "student-first")]


def reference(student, teacher, k, temperature):
    """Σ p expm1(k log p/q) / (k(k+1)) in float64, Cressie-Read's sign, teacher first."""
    log_p, log_q = (x.double().div(temperature).log_softmax(1) for x in (teacher, student))
    return (log_p.exp() * torch.expm1(k * (log_p - log_q))).sum(1) / (k * (k + 1))


def nearly_agreeing(gap, classes=1000, rows=64):
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, classes, generator=generator)
    return teacher + gap * torch.randn(rows, classes, generator=generator), teacher


NEAR_LIMITS = [(lam, form, order) for lam in (1e-9, 1e-4, 0.999, 1.0001) for _, form, order in MEMBERS[:4]]


@pytest.mark.parametrize(("gap", "tolerance"), [(1e-2, 1e-4), (1e-3, 1e-3), (1e-4, 1e-2)])
@pytest.mark.parametrize("member", [*MEMBERS, *NEAR_LIMITS])
def test_no_digits_cancel_where_student_and_teacher_nearly_agree(member, gap, tolerance):
    """Every row in float32 against float64; the terms of a row nearly cancel where they are not written to be >= 0."""
    lam, form, order = member
    student, teacher = nearly_agreeing(gap)
    log_p, log_q = (x.double().div(4).log_softmax(1) for x in (teacher, student))
    first, second = (log_p, log_q) if order == "teacher-first" else (log_q, log_p)
    k, ratio = (lam if form == "cressie-read" else -lam), first - second
    if k in (0.0, -1.0):  # KL of the first from the second, or the reverse
        exact = (first.exp() * ratio if k == 0.0 else -second.exp() * ratio).sum(1)
    elif abs(k) < abs(1 + k):
        exact = (first.exp() * torch.expm1(k * ratio)).sum(1) / (k * (1 + k))
    else:
        exact = (second.exp() * torch.expm1((1 + k) * ratio)).sum(1) / (k * (1 + k))
    got = power_divergence(student, teacher, lam, 4.0, form, order, reduction="none")
    torch.testing.assert_close(got.double(), 16 * exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("form", ["bounded", "cressie-read", "density"])
@pytest.mark.parametrize("order", ["teacher-first", "student-first"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 2 / 3, 1.0])
def test_rows_are_zero_at_the_teacher_and_not_negative_beside_it(form, order, lam):
    student, teacher = nearly_agreeing(1e-6)
    assert (power_divergence(teacher, teacher, lam, 4.0, form, order, "none") == 0).all()
    assert (power_divergence(student, teacher, lam, 4.0, form, order, "none") >= 0).all()


@pytest.mark.parametrize("lam", [0.0, 1e-3, 2 / 3, 1.0, 2.0])
def test_teacher_probabilities_that_are_zero_in_float32_cost_what_the_formula_says(lam):
    # p = (1/2, 1/2, 0, 0), q uniform: classes without teacher mass have the part Σ q/(1 - lam) of the bounded form
    student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -1e4, -1e4]])
    rows = [power_divergence(student, teacher, lam, 1.0, form, reduction="none") for form in ("bounded", "density")]
    kl = math.log(2)
    bounded = {0.0: kl, 1.0: math.inf}.get(lam) or (1 - 0.5**lam) / (lam * (1 - lam))
    density = 4 * 0.25 ** (1 + lam) - 0.25**lam if lam else kl
    density += (2 * 0.5 ** (1 + lam) - 0.25**lam) / lam if lam else 0.0
    if lam < 1:  # else a class of probability 0 has an unbounded value, where the cap applies
        assert rows[0].item() == pytest.approx(bounded, rel=1e-5)
    assert rows[1].item() == pytest.approx(density, rel=1e-5)


@pytest.mark.parametrize("member", [*MEMBERS, *DENSITIES])
@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("cap", [math.log(1e4), math.inf])
def test_huge_logits_and_one_hot_teachers_stay_finite(member, scale, cap):
    student = torch.tensor([[scale, 0.0, 0.0], [0.0, 1.0, 2.0], [scale, -scale, 0.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, scale, 0.0], [scale, 0.0, 0.0], [-scale, scale, 0.0], [scale, scale, -scale]])
    student.requires_grad_()
    lam, form, order = member
    rows = power_divergence(student, teacher, lam, 1.0, form, order, "none", cap=cap)
    rows.sum().backward()
    assert rows.isfinite().all()
    assert student.grad.isfinite().all()
    assert (rows > -1e-5).all()


def test_a_confidently_wrong_teacher_moves_the_default_less_than_kl_and_the_literal_form_more():
    # 100 classes, student confident of one (0.9), teacher of another (0.95): the L1 norm of the gradient at T = 1
    student, teacher = torch.full((1, 100), 0.1 / 99), torch.full((1, 100), 0.04 / 98)
    student[0, 0], teacher[0, 0], teacher[0, 1] = 0.9, 0.01, 0.95
    student, teacher = student.double().log().requires_grad_(), teacher.double().log()

    def gradient_norm(lam, form):
        loss = power_divergence(student, teacher, lam, 1.0, form, cap=math.inf)
        return torch.autograd.grad(loss, student)[0].abs().sum().item()

    assert gradient_norm(2 / 3, "bounded") == pytest.approx(0.33, abs=0.01)
    assert gradient_norm(0.5, "bounded") == pytest.approx(0.30, abs=0.01)
    assert gradient_norm(0.0, "bounded") == pytest.approx(1.90, abs=0.01)
    assert gradient_norm(2 / 3, "cressie-read") == pytest.approx(109, abs=1)


@pytest.mark.parametrize("classes", [2, 21_843])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_few_and_many_classes_one_and_several_rows(classes, rows, temperature):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(rows, classes, generator=generator)
    teacher = torch.randn(rows, classes, generator=generator) * 2
    for lam in (-2 / 3, -0.1, 2 / 3):
        got = power_divergence(student, teacher, lam, temperature, "cressie-read", reduction="none", scale_by_t2=False)
        expected = reference(student, teacher, lam, temperature)
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32_even_under_autocast(dtype):
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(4, 50, generator=generator).to(dtype).requires_grad_()
    teacher = (torch.randn(4, 50, generator=generator) * 3).to(dtype)
    exact = power_divergence(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = power_divergence(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    loss.backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_under_autocast_after_a_linear_layer():
    layer, inputs = torch.nn.Linear(8, 20), torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    teacher = torch.randn(5, 20, generator=torch.Generator().manual_seed(4)) * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = layer(inputs)
        loss = power_divergence(student, teacher)
    assert student.dtype == torch.bfloat16
    torch.testing.assert_close(loss, power_divergence(student.float(), teacher))
    loss.backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_teacher_row_that_is_not_finite_is_refused_by_its_index(value):
    student, teacher = torch.zeros(4, 3), torch.zeros(4, 3)
    teacher[2, 1] = value
    with pytest.raises(Refused, match="1 of 4 teacher rows are not finite, the first is row 2"):
        power_divergence(student, teacher)


def test_a_half_precision_row_whose_sum_overflows_is_not_refused():
    teacher = torch.full((2, 100), 6e4, dtype=torch.float16)
    assert power_divergence(torch.zeros(2, 100), teacher).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), Refused, "the student has 3 classes and the teacher 4"),
        (torch.zeros(2, 3), torch.zeros(3, 3), UsageError, "found 2 and 3"),
        (torch.zeros(3), torch.zeros(3), UsageError, r"must be \[batch, classes\], found shape \[3\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), UsageError, "teacher logits must be a floating"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3), UsageError, "student logits must be a floating"),
        (torch.zeros(2, 1), torch.zeros(2, 1), UsageError, "at least 1 row and 2 classes"),
        (torch.zeros(0, 3), torch.zeros(0, 3), UsageError, "at least 1 row and 2 classes"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), UsageError, "on the same device, found cpu and meta"),
        ([[0.0, 1.0]], torch.zeros(1, 2), UsageError, "found list"),
    ],
)
def test_tensors_that_do_not_match_are_refused_in_one_line(student, teacher, error, message):
    with pytest.raises(error, match=message) as caught:
        power_divergence(student, teacher)
    assert "\n" not in str(caught.value)


def test_one_buffer_is_saved_for_the_backward_pass():
    student, teacher = torch.randn(8, 1000, requires_grad=True), torch.randn(8, 1000)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        power_divergence(student, teacher)
    assert sum(saved) == student.nbytes


def test_nothing_is_saved_without_a_gradient():
    student, teacher = torch.randn(2, 10, requires_grad=True), torch.randn(2, 10)
    with torch.no_grad():
        assert not power_divergence(student, teacher).requires_grad
    assert not power_divergence(student.detach(), teacher).requires_grad


def minimiser(teacher, lam):
    """The one row of probabilities that minimises the loss over all rows of the teacher."""
    student = torch.zeros(1, teacher.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([student], lr=0.5, max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def step():
        optimiser.zero_grad()
        loss = power_divergence(student.expand_as(teacher), teacher, lam, 1.0, "cressie-read", cap=math.inf)
        loss.backward()
        return loss

    optimiser.step(step)
    return student.detach().softmax(1)[0]


@pytest.mark.parametrize("lam", [-0.9, -2 / 3, -0.5, 0.0, 1 / 3, 2 / 3])
def test_the_minimiser_is_the_power_mean_of_the_teacher_rows(lam):
    # 40 teacher rows, a fifth of them confidently wrong: s ∝ (mean t^(1+lam))^(1/(1+lam)).
    generator = torch.Generator().manual_seed(5)
    teacher = torch.full((40, 6), 0.02)
    columns = torch.where(torch.arange(40) < 8, torch.randint(1, 6, (40,), generator=generator), 0)
    teacher[torch.arange(40), columns] = 0.9
    teacher = teacher.double().log() + 0.3 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    mean = teacher.softmax(1).pow(1 + lam).mean(0).pow(1 / (1 + lam))
    torch.testing.assert_close(minimiser(teacher, lam), mean / mean.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lam", "true", "wrong"), [(0.0, 0.72, 0.18), (2 / 3, 0.64, 0.28), (-0.5, 0.80, 0.06), (-2 / 3, 0.81, 0.03)]
)
def test_bounded_members_drop_a_systematic_mistake_and_unbounded_ones_keep_it(lam, true, wrong):
    # 100 classes; every fifth row is as confident of one wrong class as the others are of the right one.
    teacher = torch.full((5, 100), 0.1 / 99, dtype=torch.float64)
    teacher[:4, 0], teacher[4, 1] = 0.9, 0.9
    student = minimiser(teacher.log(), lam)
    assert student[:2].tolist() == pytest.approx([true, wrong], abs=0.01)


@pytest.mark.slow  # two to ten seconds of C++ compilation for each member
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("lam", "form"),
    [(2 / 3, "bounded"), (0.0, "bounded"), (0.95, "bounded"), (1.0, "cressie-read"), (2 / 3, "density")],
)
def test_compiles_into_one_graph_with_the_same_gradient(lam, form):
    torch.compiler.reset()

    def loss(student, teacher):
        return power_divergence(student, teacher, lam, 2.0, form)

    student, teacher = torch.randn(7, 33, requires_grad=True), torch.randn(7, 33) * 3
    compiled, eager = torch.compile(loss, fullgraph=True)(student, teacher), loss(student, teacher)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, student)[0], torch.autograd.grad(eager, student)[0], rtol=1e-5, atol=1e-6
    )
    student, teacher = nearly_agreeing(1e-3, classes=33, rows=7)
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True)(student, teacher), loss(student, teacher), rtol=1e-3, atol=0
    )
