"""The other losses under gradcheck, extreme rows, autocast, and changes of order and shift that must not matter."""

from functools import partial

import pytest
import torch

from redistill.losses import controls, corrections, curriculum, decoupled, hinton, ranking, relational
from redistill.losses.curriculum import TrainingProgress

ctkd = partial(curriculum.CurriculumTemperature(), progress=TrainingProgress(5.0, 10.0))


def standardized_kd(student, teacher):
    return hinton.kd(hinton.standardize(student), hinton.standardize(teacher), temperature=2.0)


PLAIN = {
    "kd": hinton.kd,
    "standardized kd": standardized_kd,
    "ttm": hinton.ttm,
    "wttm": hinton.wttm,
    "luminet": hinton.luminet,
    "bd_kd": hinton.bd_kd,
    "taid": curriculum.taid,
    "ctkd": ctkd,
    "pearson": relational.pearson,
    "pearson of logits": partial(relational.pearson, of="logits"),
    "spearman": relational.spearman,
    "dist": relational.dist,
    "r2kd": relational.r2kd,
    "mlkd_class": relational.mlkd_class,
    "mlkd_batch": relational.mlkd_batch,
    "sinkhorn": relational.sinkhorn,
    "dkpp": controls.dkpp,
    "logit_mse": hinton.logit_mse,
    "logit_mse centered": partial(hinton.logit_mse, centered=True),
    "mld": hinton.mld,
}
LABELLED = {
    "dkd": decoupled.dkd,
    "nkd": decoupled.nkd,
    "rld": decoupled.rld,
    "pld": ranking.pld,
    "topkd": ranking.topkd,
    "swap_kd": corrections.swap_kd,
    "label_revision": corrections.label_revision,
    "rc": corrections.rc,
    "cwtm": controls.cwtm,
    "label_smoothing": controls.label_smoothing,
    "virtual_teacher": controls.virtual_teacher,
    "tf_kd": controls.tf_kd,
}
NAMES = [*PLAIN, *LABELLED]
# What may not change: the order of the rows, the order of the classes, a constant added to every row.
ORDER_OF_CLASSES_MATTERS = {"dkpp"}
SHIFT_MATTERS = {"logit_mse", "mld", "topkd", "rc"}
# Their targets follow the student without a gradient: finite differences see a term that autograd must not.
TARGET_FOLLOWS_STUDENT = {"taid", "rc"}


def call(name, student, teacher, labels):
    return LABELLED[name](student, teacher, labels=labels) if name in LABELLED else PLAIN[name](student, teacher)


def batch(rows=5, classes=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, classes, generator=generator, dtype=dtype) * 2
    teacher = torch.randn(rows, classes, generator=generator, dtype=dtype) * 3
    return student, teacher, torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TARGET_FOLLOWS_STUDENT])
def test_gradcheck(name):
    student, teacher, labels = batch()
    assert torch.autograd.gradcheck(lambda z: call(name, z, teacher, labels), student.requires_grad_())


def test_targets_that_follow_the_student_carry_no_gradient():
    student, teacher, labels = batch()
    student.requires_grad_()
    s = student.detach().softmax(1)
    target = (0.6 * student.detach() + 0.4 * teacher).softmax(1)
    (taid,) = torch.autograd.grad(curriculum.taid(student, teacher, reduction="sum"), student)
    torch.testing.assert_close(taid, s - target)

    raised = student.detach().clone()
    raised[torch.arange(5), labels] += raised.amax(1)
    s, t, r = ((x / 4).softmax(1) for x in (student.detach(), teacher, raised))
    (rc,) = torch.autograd.grad(corrections.rc(student, teacher, labels=labels, reduction="sum"), student)
    torch.testing.assert_close(rc, 4 * (s - t) + 0.4 * (s - r))


def extreme(kind, rows, classes):
    """Rows that break naive code: huge logits, one-hot and constant rows, on either side or on both."""
    student, teacher, labels = batch(rows, classes, torch.float32)
    hot = torch.nn.functional.one_hot(labels, classes).float() * 2e4 - 1e4
    wrong = torch.nn.functional.one_hot((labels + 1) % classes, classes).float() * 2e4 - 1e4
    return {
        "huge": (student * 1e4, teacher * 1e4),
        "right one-hot teacher": (student, hot),
        "wrong one-hot teacher": (student, wrong),
        "both one-hot, different": (wrong, hot),
        "both one-hot, equal": (hot, hot),
        "one-hot student": (wrong, teacher),
        "same": (teacher, teacher),
        "constant student": (torch.zeros_like(student), teacher),
        "constant student, not round": (torch.full_like(student, 0.1), teacher),
        "constant teacher": (student, torch.zeros_like(teacher)),
        "both constant": (torch.ones_like(student), torch.zeros_like(teacher)),
        "far from zero": (student + 1e4, teacher - 1e4),
    }[kind], labels


KINDS = [
    "huge",
    "right one-hot teacher",
    "wrong one-hot teacher",
    "both one-hot, different",
    "both one-hot, equal",
    "one-hot student",
    "same",
    "constant student",
    "constant student, not round",
    "constant teacher",
    "both constant",
    "far from zero",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "classes"), [(5, 6), (1, 6), (5, 2), (1, 2)])
def test_extreme_rows_give_finite_values_and_gradients(name, rows, classes):
    for kind in KINDS:
        (student, teacher), labels = extreme(kind, rows, classes)
        student = student.clone().requires_grad_()
        value = call(name, student, teacher, labels)
        value.backward()
        assert value.isfinite(), kind
        assert student.grad.isfinite().all(), kind
        # A gradient of 1/eps, from a degenerate norm, would be finite and still end the run.
        assert student.grad.abs().max() <= 1e6, kind


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_change_a_bit_of_the_value(name):
    student, teacher, labels = batch(8, 100, torch.float32)
    expected = call(name, student, teacher, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(name, student, teacher, labels), expected)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_computed_in_float32(name):
    student, teacher, labels = batch(8, 10, torch.float32)
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    value = call(name, student, teacher, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, call(name, student.float(), teacher.float(), labels))
    value.backward()
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient(name):
    student, teacher, labels = batch()
    teacher.requires_grad_()
    call(name, student.requires_grad_(), teacher, labels).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_does_not_matter(name):
    student, teacher, labels = batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = call(name, student[order], teacher[order], labels[order])
    torch.testing.assert_close(shuffled, call(name, student, teacher, labels))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ORDER_OF_CLASSES_MATTERS])
def test_order_of_classes_does_not_matter(name):
    student, teacher, labels = batch()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    renamed = order.argsort()[labels]
    shuffled = call(name, student[:, order], teacher[:, order], renamed)
    torch.testing.assert_close(shuffled, call(name, student, teacher, labels))


@pytest.mark.parametrize("name", NAMES)
def test_shift_matters_for_the_listed_losses_only(name):
    student, teacher, labels = batch()
    if name == "label_revision":  # its squared error of logits acts on rows where the teacher is right
        labels = teacher.argmax(1)
    shifted = call(name, student + 3.0, teacher - 2.0, labels)
    same = torch.isclose(shifted, call(name, student, teacher, labels)).item()
    assert same == (name not in SHIFT_MATTERS | {"label_revision", "dkpp"})


@pytest.mark.parametrize(
    "name", ["kd", "bd_kd", "dkd", "dist", "sinkhorn", "mlkd_class", "logit_mse", "mld", "spearman"]
)
def test_a_divergence_is_smallest_at_the_teacher(name):
    student, teacher, labels = batch()
    at_teacher = teacher.clone().requires_grad_()
    least = call(name, at_teacher, teacher, labels)
    least.backward()
    assert least < call(name, student, teacher, labels)
    if name != "sinkhorn":  # its L1 cost has no gradient there
        # The eps that DIST adds to its norms leaves about 1e-6.
        torch.testing.assert_close(at_teacher.grad, torch.zeros_like(teacher), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name):
    student, teacher, labels = batch(8, 10, torch.float32)
    student.requires_grad_()
    torch.compiler.reset()
    # Graph breaks depend on the tracer alone, so the cheapest backend will do.
    compiled = torch.compile(lambda z: call(name, z, teacher, labels), backend="eager", fullgraph=True)
    value = compiled(student)
    torch.testing.assert_close(value, call(name, student, teacher, labels))
    value.backward()
    assert student.grad.isfinite().all()
