"""Losses on features against slow references: plain loops in float64, written from the formulas."""

import copy
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused, UsageError
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from redistill.losses import relational
from redistill.losses.features import Contrast, FeatureMatch, NormDirection, OrthogonalMatch, OrthogonalProjector
from redistill.losses.heads import AdaptedTeacher, DualHead, ExitHead, SubclassHead

ROWS, STUDENT, TEACHER, CLASSES = 6, 5, 7, 4
SIZES = {"student_width": STUDENT, "teacher_width": TEACHER, "num_classes": CLASSES}


# -- the losses, and batches for them ---------------------------------------------------------------------------------

MAKE = {
    "features": (FeatureMatch, {}),
    "features cosine": (FeatureMatch, {"match": "cosine"}),
    "nd": (NormDirection, {}),
    "vkd": (OrthogonalMatch, {}),
    "dcd": (Contrast, {"width": 3}),
    "dual": (DualHead, {}),
    "exit": (ExitHead, {"eps": 1.5}),
    "lelp": (SubclassHead, {"subclasses": 3, "sharpness": 0.7}),
    "pesf": (AdaptedTeacher, {"hidden": 3}),
    "rkd": (relational.rkd, {}),
}
NAMES = list(MAKE)
PER_ROW = [name for name in NAMES if name not in ("dcd", "rkd")]
INPUTS = {
    "nd": ("student_features", "teacher_features", "labels"),
    "dual": ("student_features", "teacher_logits"),
    "exit": ("student_features", "teacher_logits", "labels"),
    "lelp": ("student_features", "teacher_features", "teacher_logits"),
    "pesf": ("student_logits", "teacher_logits", "teacher_features", "labels"),
}
WIDTHS = {
    "dual": ("student_width", "num_classes"),
    "exit": ("student_width", "num_classes"),
    "pesf": ("teacher_width", "num_classes"),
    "nd": tuple(SIZES),
    "lelp": tuple(SIZES),
}
TWO_WIDTHS = ("student_width", "teacher_width")


def inputs_of(name):
    return INPUTS.get(name, ("student_features", "teacher_features"))


def seen(dtype=torch.float64):
    """The teacher's rows before training: 9 of each class, spread differently by class."""
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(CLASSES), 9)
    rows = random.normal(0, 1, (len(labels), TEACHER)) * (1 + labels[:, None]) + random.normal(0, 2, (1, TEACHER))
    return torch.tensor(rows, dtype=dtype), torch.tensor(labels)


def make(name, dtype=torch.float64, sizes=SIZES, fit=True):
    """The loss of that name; a module has random parameters and has seen the teacher's rows."""
    kind, options = MAKE[name]
    if not isinstance(kind, type):
        return partial(kind, **options)
    torch.manual_seed(0)
    module = kind(**{width: sizes[width] for width in WIDTHS.get(name, TWO_WIDTHS)}, **options)
    if dtype == torch.float64:
        module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if fit and hasattr(module, "fit"):
        module.fit(*seen(dtype))
    return module


def batch(rows=ROWS, dtype=torch.float64, sizes=SIZES, seed=0):
    random = np.random.default_rng(seed)

    def drawn(width, scale):
        return torch.tensor(random.normal(0.2, scale, (rows, width)), dtype=dtype)

    return {
        "student_features": drawn(sizes["student_width"], 1.0),
        "teacher_features": drawn(sizes["teacher_width"], 2.0),
        "student_logits": drawn(sizes["num_classes"], 2.0),
        "teacher_logits": drawn(sizes["num_classes"], 3.0),
        "labels": torch.tensor(random.integers(0, sizes["num_classes"], rows)),
    }


def call(name, loss, values, **options):
    return loss(**{key: values[key] for key in inputs_of(name)}, **options)


def parameters_of(loss):
    return list(loss.parameters()) if isinstance(loss, torch.nn.Module) else []


# -- slow references --------------------------------------------------------------------------------------------------


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def norm(x):
    return math.sqrt(dot(x, x))


def minus(x, y):
    return [a - b for a, b in zip(x, y, strict=True)]


def affine(layer, row):
    weight = layer.weight.tolist()
    bias = [0.0] * len(weight) if layer.bias is None else layer.bias.tolist()
    return [dot(w, row) + b for w, b in zip(weight, bias, strict=True)]


def softmax(row, temperature=1.0):
    top = max(row)
    powers = [math.exp((x - top) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def smooth_l1(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def ref_features(module, s, t, **_):
    assert module.projector.bias is None
    return mean((a - b) ** 2 for a, b in zip(affine(module.projector, s), t, strict=True))


def ref_cosine(module, s, t, **_):
    p = affine(module.projector, s)
    return 1 - dot(p, t) / norm(p) / norm(t)


def ref_nd(module, s, t, y, **_):
    rows, labels = seen()
    center = [mean(row[j] for row, c in zip(rows.tolist(), labels.tolist(), strict=True) if c == y) for j in range(7)]
    p = affine(module.projector, s)
    return 1 - dot(p, center) / norm(center) / max(norm(p), norm(t))


def ref_vkd(module, s, t, **_):
    """The projector from the Cayley transform of the whole skew-symmetric matrix."""
    free = module.projector.free.detach().numpy()
    skew = np.zeros((TEACHER, TEACHER))
    for i in range(TEACHER):
        for j in range(min(i, STUDENT)):
            skew[i, j], skew[j, i] = free[i, j], -free[i, j]
    one = np.eye(TEACHER)
    cayley = np.linalg.inv(one + skew / 2) @ (one - skew / 2)
    p = module.projector.start.numpy() @ cayley[:, :STUDENT] @ np.array(s)
    deviation = math.sqrt(mean((x - mean(t)) ** 2 for x in t) + 1e-5)
    return mean(smooth_l1(a - (b - mean(t)) / deviation) for a, b in zip(p, t, strict=True))


def ref_dual(module, s, v, **_):
    return 4 * kl(softmax(v, 2), softmax(affine(module.head, s), 2))


def ref_exit(module, s, v, y, **_):
    p, q = softmax(v), softmax(affine(module.head, s))
    return -sum(((p[k] + (k == y)) ** 1.5 - (k == y)) * math.log(q[k]) for k in range(CLASSES))


def ref_lelp(module, s, t, v, **_):
    """Principal directions from the covariance, one class at a time; their signs are those that the text states."""
    rows, labels = (x.numpy() for x in seen())
    target = []
    for c, p in enumerate(softmax(v, 4)):
        own = rows[labels == c]
        values, vectors = np.linalg.eigh(np.cov(own.T, bias=True))
        leading = vectors.T[::-1][:3]
        leading = np.array([x * np.sign(x[np.argmax(np.abs(x))]) for x in leading])
        u = module.rotation.numpy() @ (leading @ (np.array(t) - own.mean(0))) / math.sqrt(mean(values[::-1][:3]))
        target += [p * q for q in softmax(list(u), 0.7)]
    return 16 * kl(target, softmax(affine(module.head, s), 4))


def ref_pesf(module, z, v, t, y, **_):
    hidden = [max(x, 0.0) for x in affine(module.down, affine(module.first, t))]
    adapted = minus(v, affine(module.up, hidden))
    return 36 * kl(softmax(adapted, 6), softmax(z, 6)) - math.log(softmax(adapted)[y])


def ref_rkd(_, students, teachers):
    def distances(rows):
        all_pairs = [[norm(minus(a, b)) for b in rows] for a in rows]
        average = mean(d for i, row in enumerate(all_pairs) for j, d in enumerate(row) if i != j)
        return [d / average for row in all_pairs for d in row]

    def angles(rows):
        cosines = []
        for j in range(ROWS):
            for i in range(ROWS):
                for k in range(ROWS):
                    x, y = minus(rows[i], rows[j]), minus(rows[k], rows[j])
                    cosines.append(0.0 if j in (i, k) else dot(x, y) / norm(x) / norm(y))
        return cosines

    by_distance = mean(map(smooth_l1, minus(distances(students), distances(teachers))))
    return 25 * by_distance + 50 * mean(map(smooth_l1, minus(angles(students), angles(teachers))))


def ref_dcd(module, students, teachers):
    """With the published bias, here 0.7, which must not matter."""

    def embedded(layer, rows):
        return [[x / norm(affine(layer, row)) for x in affine(layer, row)] for row in rows]

    s, t = embedded(module.embed_student, students), embedded(module.embed_teacher, teachers)
    scale = min(math.exp(module.log_scale.item()), 10)
    logits = [[scale * dot(a, b) + 0.7 for b in t] for a in s]
    of_rows = [softmax(row) for row in logits]
    of_columns = [softmax(list(column)) for column in zip(*logits, strict=True)]
    contrast = mean(-math.log(of_rows[i][i]) for i in range(ROWS))
    return contrast + 0.5 * mean(kl(of_columns[i], of_rows[i]) for i in range(ROWS))


SHORT = {"student_features": "s", "teacher_features": "t", "student_logits": "z", "teacher_logits": "v", "labels": "y"}
BY_ROW = {
    "features": ref_features,
    "features cosine": ref_cosine,
    "nd": ref_nd,
    "vkd": ref_vkd,
    "dual": ref_dual,
    "exit": ref_exit,
    "lelp": ref_lelp,
    "pesf": ref_pesf,
}


@pytest.mark.parametrize("name", PER_ROW)
def test_row_values_equal_the_slow_reference(name):
    loss, values = make(name), batch()
    lists = {short: values[key].tolist() for key, short in SHORT.items()}
    expected = [BY_ROW[name](loss, **{short: rows[i] for short, rows in lists.items()}) for i in range(ROWS)]
    got = call(name, loss, values, reduction="none")
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9)
    assert call(name, loss, values).item() == pytest.approx(mean(expected), rel=1e-9)
    assert call(name, loss, values, reduction="sum").item() == pytest.approx(sum(expected), rel=1e-9)


@pytest.mark.parametrize(("name", "reference"), [("rkd", ref_rkd), ("dcd", ref_dcd)])
def test_batch_values_equal_the_slow_reference(name, reference):
    loss, values = make(name), batch()
    expected = reference(loss, values["student_features"].tolist(), values["teacher_features"].tolist())
    assert call(name, loss, values).item() == pytest.approx(expected, rel=1e-9)
    assert call(name, loss, values, reduction="sum").item() == pytest.approx(ROWS * expected, rel=1e-9)
    with pytest.raises(UsageError, match="statistic of the batch"):
        call(name, loss, values, reduction="none")


# -- what holds for all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_student_and_of_the_parameters(name):
    loss, values = make(name), batch()
    key = "student_logits" if name == "pesf" else "student_features"
    parameters = parameters_of(loss)

    def value(student, *_):
        return call(name, loss, values | {key: student})

    assert torch.autograd.gradcheck(value, (values[key].requires_grad_(), *parameters))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_change_a_bit_of_value_and_gradient(name):
    loss, values = make(name, torch.float32), batch(dtype=torch.float32)
    key = "student_logits" if name == "pesf" else "student_features"

    def run(enabled):
        student = values[key].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = call(name, loss, values | {key: student})
        return [value, *torch.autograd.grad(value, [student, *parameters_of(loss)])]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
    half = {key: v if key == "labels" else v.bfloat16() for key, v in values.items()}
    assert call(name, loss, half).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient(name):
    loss, values = make(name), batch()
    for key in values:
        if key != "labels":
            values[key].requires_grad_()
    call(name, loss, values).backward()
    assert values["teacher_features"].grad is None
    assert values["teacher_logits"].grad is None


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_does_not_matter(name):
    loss, values = make(name), batch()
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    shuffled = {key: value[order] for key, value in values.items()}
    torch.testing.assert_close(call(name, loss, shuffled), call(name, loss, values))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, ROWS])
@pytest.mark.parametrize("kind", ["zero student", "zero teacher", "both zero", "constant", "same rows", "huge"])
def test_extreme_rows_give_finite_values_and_gradients(name, rows, kind):
    loss, values = make(name, torch.float32), batch(rows, torch.float32)
    for key in values:
        if key == "labels":
            continue
        if kind in ("zero " + key.split("_")[0], "both zero"):
            values[key] = torch.zeros_like(values[key])
        elif kind == "constant":
            values[key] = torch.full_like(values[key], 0.1)
        elif kind == "same rows":
            values[key] = values[key][:1].expand(rows, -1).clone()
        elif kind == "huge":
            values[key] = values[key] * 1e4
    key = "student_logits" if name == "pesf" else "student_features"
    student = values[key].clone().requires_grad_()
    value = call(name, loss, values | {key: student})
    gradients = torch.autograd.grad(value, [student, *parameters_of(loss)], allow_unused=True)
    assert value.isfinite()
    for gradient in gradients:
        # A gradient of 1/eps, from a row of length 0, would be finite and still end the run.
        assert gradient is None or gradient.abs().max() <= (1e8 if kind == "huge" else 1e4)
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*device_type of 'cuda'")
@pytest.mark.parametrize("name", NAMES)
def test_forward_never_waits_for_an_accelerator(name):
    """On CUDA tensors without values (no such device is needed), what needs a value on the host raises."""
    with FakeTensorMode(), torch.device("cuda"):
        loss = make(name, torch.float32, fit=False)
        values = {key: value.to("cuda") for key, value in batch(dtype=torch.float32).items()}
        value = call(name, loss, values)
        assert value.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            value.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_on_cuda_equal_the_cpu_and_never_wait(name):
    loss, values = make(name), batch()
    expected = call(name, loss, values)
    on_device = loss.to("cuda") if isinstance(loss, torch.nn.Module) else loss
    moved = {key: value.to("cuda") for key, value in values.items()}
    key = "student_logits" if name == "pesf" else "student_features"
    student = moved[key].requires_grad_()
    call(name, on_device, moved).backward()  # the first call sets up the libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = call(name, on_device, moved | {key: student})
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name):
    loss, values = make(name, torch.float32), batch(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda v: call(name, loss, v), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(values), call(name, loss, values))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rkd"])
def test_a_saved_state_gives_the_same_bits_after_further_steps(name):
    """Two steps of AdamW, saved, two more; a new module with the saved state repeats the last two, bit by bit."""
    values = batch(dtype=torch.float32)

    def steps(loss, optimiser, count):
        for _ in range(count):
            optimiser.zero_grad()
            call(name, loss, values).backward()
            optimiser.step()

    loss = make(name, torch.float32)
    optimiser = torch.optim.AdamW(loss.parameters(), lr=0.01, weight_decay=0.1)
    steps(loss, optimiser, 2)
    saved = copy.deepcopy((loss.state_dict(), optimiser.state_dict()))
    steps(loss, optimiser, 2)
    torch.manual_seed(7)
    kind, options = MAKE[name]
    other = kind(**{width: SIZES[width] for width in WIDTHS.get(name, TWO_WIDTHS)}, **options)
    again = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(other, again, 2)
    assert loss.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rkd"])
def test_the_start_depends_on_the_seed_alone(name):
    first, second = make(name).state_dict(), make(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- claims of the papers ---------------------------------------------------------------------------------------------


def orthogonal(width, seed=3):
    return torch.tensor(np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0])


def test_rkd_ignores_rotation_translation_and_scale_of_either_side():
    values = batch()
    student, teacher = values["student_features"], values["teacher_features"]
    moved = relational.rkd(3 * student @ orthogonal(STUDENT) + 2, 0.1 * teacher @ orthogonal(TEACHER) - 5)
    torch.testing.assert_close(moved, relational.rkd(student, teacher))
    assert relational.rkd(student, 2 * student @ orthogonal(STUDENT)).item() == pytest.approx(0, abs=1e-12)


def test_rkd_refuses_a_batch_that_would_not_fit_in_memory():
    with pytest.raises(UsageError, match="use a smaller batch"):
        relational.rkd(torch.zeros(700, 2), torch.zeros(700, 2))


def test_nd_is_zero_at_the_direction_and_norm_of_the_class_and_does_not_fall_further():
    loss = NormDirection(student_width=TEACHER, teacher_width=TEACHER, num_classes=CLASSES)
    loss.fit(*seen())
    assert loss.projector is None
    labels = torch.tensor([0, 1, 2, 3])
    direction = loss.directions.double()
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(CLASSES, dtype=torch.float64))
    teacher = 4 * torch.roll(direction, 1, 0)
    at, short = (loss(k * direction, teacher, labels=labels, reduction="none") for k in (4, 1))
    torch.testing.assert_close(at, torch.zeros_like(at), atol=1e-6, rtol=0)
    torch.testing.assert_close(loss(9 * direction, teacher, labels=labels, reduction="none"), at, atol=1e-6, rtol=0)
    torch.testing.assert_close(short, torch.full_like(short, 0.75))


def test_nd_and_lelp_accept_a_class_without_rows():
    features, labels = seen(torch.float32)
    some = labels != 2
    values = batch(dtype=torch.float32) | {"labels": torch.full((ROWS,), 2)}
    for name in ("nd", "lelp"):
        loss = make(name, torch.float32)
        loss.fit(features[some], labels[some])
        value = call(name, loss, values, reduction="none")
        assert value.isfinite().all()
        if name == "nd":
            assert (value == 1).all()
        else:
            assert (loss.coordinates(values["teacher_features"])[:, 2] == 0).all()


@pytest.mark.parametrize(("n", "m"), [(5, 7), (7, 5), (6, 6), (1, 4), (512, 64), (64, 512)])
def test_the_projector_of_vkd_stays_orthogonal_in_training_with_weight_decay(n, m):
    torch.manual_seed(0)
    projector = OrthogonalProjector(n, m)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=0.1, weight_decay=0.5)
    before = projector.weight(torch.float32).detach()
    inputs, targets = torch.randn(16, n), 5 * torch.randn(16, m)
    for _ in range(20):
        optimiser.zero_grad()
        (projector(inputs) - targets).square().mean().backward()
        optimiser.step()
    weight = projector.weight(torch.float32).detach()
    assert weight.shape == (m, n)
    gram = weight @ weight.T if m < n else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(n, m)), atol=2e-5, rtol=0)
    assert (weight - before).norm() > 0.1 or (n, m) == (1, 1)


def test_vkd_keeps_the_geometry_of_the_student_and_ignores_shift_and_scale_of_teacher_rows():
    loss, values = make("vkd"), batch()
    student, teacher = values["student_features"], values["teacher_features"]
    torch.testing.assert_close(
        torch.cdist(loss.projector(student), loss.projector(student)), torch.cdist(student, student)
    )
    torch.testing.assert_close(loss(student, 3 * teacher + 2), loss(student, teacher), rtol=1e-4, atol=0)


def test_dcd_is_bounded_in_scale_by_its_largest_and_learns_its_temperature():
    loss, values = make("dcd"), batch()
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    expected = ref_dcd(loss, values["student_features"].tolist(), values["teacher_features"].tolist())
    assert call("dcd", loss, values).item() == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        loss.log_scale.fill_(1.0)
    call("dcd", loss, values).backward()
    assert loss.log_scale.grad.abs() > 1e-4


def test_lelp_coordinates_have_unit_variance_on_average_and_its_target_sums_to_the_teachers_classes():
    loss = make("lelp")
    features, labels = seen()
    within = loss.coordinates(features)
    for c in range(CLASSES):
        own = within[labels == c, c]
        torch.testing.assert_close(own.mean(0), torch.zeros(3, dtype=own.dtype), atol=1e-9, rtol=0)
        assert own.square().mean().item() == pytest.approx(1.0)
    values = batch()
    perfect = values["teacher_logits"][:, :, None] + 4 * (
        loss.coordinates(values["teacher_features"]) / 0.7
    ).log_softmax(2)
    head = torch.nn.Linear(3 * CLASSES, 3 * CLASSES, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3 * CLASSES))
        head.bias.zero_()
    loss.head = head
    assert loss(perfect.flatten(1), values["teacher_features"], values["teacher_logits"]).abs() < 1e-12


def test_lelp_may_have_more_subclasses_than_directions():
    loss = SubclassHead(**SIZES, subclasses=TEACHER + 3).double()
    loss.fit(*seen())
    features, labels = seen()
    own = loss.coordinates(features)[labels == 1, 1]
    assert own.square().mean().item() == pytest.approx(1.0)
    assert torch.linalg.matrix_rank(own - own.mean(0)) == TEACHER


def test_exit_with_eps_1_is_cross_entropy_with_the_teacher():
    torch.manual_seed(0)
    loss, values = ExitHead(student_width=STUDENT, num_classes=CLASSES).double(), batch()
    student = loss.head(values["student_features"])
    expected = torch.nn.functional.cross_entropy(student, values["teacher_logits"].softmax(1))
    got = loss(values["student_features"], values["teacher_logits"], labels=values["labels"])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("detach", [False, True])
def test_the_detached_dual_head_gives_the_backbone_a_gradient_of_exactly_zero(detach):
    loss = DualHead(student_width=STUDENT, num_classes=CLASSES, detach=detach).double()
    values = batch()
    student = values["student_features"].requires_grad_()
    call("dual", loss, values).backward()
    assert (student.grad is None) == detach
    assert loss.head.weight.grad.abs().max() > 0


def test_pesf_starts_from_the_teachers_logits_and_lowers_the_adapted_cross_entropy():
    loss, values = make("pesf"), batch(rows=32)
    with torch.no_grad():
        loss.up.weight.zero_()
        loss.up.bias.zero_()
    log_t, log_s = (values[side + "_logits"].div(6).log_softmax(1) for side in ("teacher", "student"))
    expected = 36 * torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    expected += torch.nn.functional.cross_entropy(values["teacher_logits"], values["labels"])
    torch.testing.assert_close(call("pesf", loss, values), expected)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(50):
        optimiser.zero_grad()
        value = call("pesf", loss, values)
        value.backward()
        optimiser.step()
    assert value < expected - 0.1


def test_feature_matching_reaches_a_linear_image_of_the_student():
    torch.manual_seed(0)
    values = batch(rows=64)
    student = values["student_features"].float()
    teacher = student @ torch.randn(STUDENT, TEACHER)
    for match in ("mse", "cosine"):
        loss = FeatureMatch(student_width=STUDENT, teacher_width=TEACHER, match=match)
        optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(300):
            optimiser.zero_grad()
            value = loss(student, teacher)
            value.backward()
            optimiser.step()
        assert value < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_student_learns_from_every_loss(name):
    """Trained on half of the rows, a small network is closer to the teacher than before on the other half."""
    sizes = {"student_width": 16, "teacher_width": TEACHER, "num_classes": CLASSES}
    loss = make(name, torch.float32, sizes)
    torch.manual_seed(1)
    images = torch.randn(256, 8)
    teacher = torch.nn.Sequential(torch.nn.Linear(8, TEACHER), torch.nn.Tanh())
    teacher_head = torch.nn.Linear(TEACHER, CLASSES)
    student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
    student_head = torch.nn.Linear(16, CLASSES)
    with torch.no_grad():
        targets = {"teacher_features": 2 * teacher(images)}
        targets["teacher_logits"] = 3 * teacher_head(targets["teacher_features"])
    targets["labels"] = targets["teacher_logits"].argmax(1)
    if hasattr(loss, "fit"):
        loss.fit(targets["teacher_features"], targets["labels"])

    def value(rows):
        features = student(images[rows])
        outputs = {"student_features": features, "student_logits": student_head(features)}
        return call(name, loss, outputs | {key: target[rows] for key, target in targets.items()})

    seen_rows, other_rows = torch.arange(128), torch.arange(128, 256)
    before = value(other_rows).item()
    parameters = [*student.parameters(), *student_head.parameters(), *parameters_of(loss)]
    optimiser = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(100):
        optimiser.zero_grad()
        value(seen_rows).backward()
        optimiser.step()
    assert value(other_rows).item() < 0.8 * before


# -- refusals ---------------------------------------------------------------------------------------------------------


def bad(name, **changes):
    return lambda: call(name, make(name, torch.float32), batch(dtype=torch.float32) | changes)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: FeatureMatch(student_width=5, teacher_width=7, project="none"),
            "project=none needs layers of one width",
        ),
        (lambda: FeatureMatch(student_width=5, teacher_width=7, match="mae"), "unknown match 'mae'"),
        (lambda: FeatureMatch(student_width=5, teacher_width=7, project="conv"), "unknown project 'conv'"),
        (lambda: Contrast(student_width=5, teacher_width=7, width=0), "width must be at least 1"),
        (lambda: Contrast(student_width=5, teacher_width=7, max_scale=0.0), "max_scale must be"),
        (lambda: DualHead(student_width=5, num_classes=4, temperature=-1.0), "temperature must be"),
        (lambda: ExitHead(student_width=5, num_classes=4, eps=0.0), "eps must be"),
        (lambda: SubclassHead(**SIZES, subclasses=0), "subclasses must be at least 1"),
        (lambda: SubclassHead(**SIZES, sharpness=0.0), "sharpness must be"),
        (lambda: AdaptedTeacher(teacher_width=7, num_classes=4, hidden=0), "hidden must be"),
        (lambda: AdaptedTeacher(teacher_width=7, num_classes=4, adapter_weight=-1.0), "adapter_weight must be"),
        (lambda: relational.rkd(torch.ones(2, 3), torch.ones(2, 3), angle_weight=math.nan), "angle_weight must be"),
        (lambda: relational.rkd(torch.ones(2, 3), torch.ones(2, 3), distance_weight=-1.0), "distance_weight must be"),
        (lambda: Contrast(student_width=5, teacher_width=7, consistency=-0.5), "consistency must be"),
        (bad("features", student_features=torch.zeros(ROWS, 4)), "expected student features of width 5, found 4"),
        (bad("features", teacher_features=torch.zeros(ROWS, 8)), "expected teacher features of width 7, found 8"),
        (bad("vkd", student_features=torch.zeros(ROWS, 4)), "expected student features of width 5, found 4"),
        (bad("vkd", teacher_features=torch.zeros(ROWS, 8)), "expected teacher features of width 7, found 8"),
        (bad("nd", teacher_features=torch.zeros(ROWS, 8)), "expected teacher features of width 7, found 8"),
        (bad("lelp", teacher_features=torch.zeros(ROWS, 8)), "expected teacher features of width 7, found 8"),
        (bad("lelp", teacher_logits=torch.zeros(ROWS, 3)), "the teacher 3"),
        (bad("rkd", student_features=torch.zeros(5, 5)), "same number of rows, found 5 and 6"),
        (bad("rkd", student_features=torch.zeros(ROWS, 5, 2)), r"\[batch, width\], found shape \[6, 5, 2\]"),
        (bad("dcd", student_features=torch.zeros(ROWS, 5).long()), "floating point"),
        (bad("pesf", teacher_features=torch.zeros(5, TEACHER)), "same number of rows"),
        (bad("lelp", teacher_logits=torch.zeros(5, CLASSES)), "same number of rows"),
        (bad("dual", teacher_logits=torch.zeros(ROWS, 3)), "the teacher 3"),
        (bad("features", teacher_features=torch.full((ROWS, TEACHER), math.nan)), "6 of 6 teacher rows are not finite"),
        (bad("lelp", teacher_logits=torch.full((ROWS, CLASSES), math.inf)), "6 of 6 teacher rows are not finite"),
        (bad("nd", labels=torch.full((ROWS,), 4)), r"labels must be in 0\.\.3, found 4\.\.4"),
        (bad("nd", labels=None), "needs labels"),
        (lambda: make("nd").fit(seen()[0], seen()[1] - 1), r"labels must be in 0\.\.3, found -1\.\.2"),
        (lambda: make("lelp").fit(seen()[0], seen()[1][:-1]), r"labels must be an int64 tensor of shape \[36\]"),
        (lambda: make("nd").fit(seen()[0][:, :5], seen()[1]), "expected teacher features of width 7, found 5"),
        (lambda: make("lelp").fit(seen()[0] / 0, seen()[1]), "teacher rows are not finite"),
    ],
)
def test_invalid_options_and_inputs_are_refused_in_one_line(attempt, message):
    with pytest.raises((UsageError, Refused), match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nd", "lelp"])
def test_a_loss_that_has_not_seen_the_teachers_rows_is_refused(name):
    kind, options = MAKE[name]
    with pytest.raises(UsageError, match="call fit"):
        call(name, kind(**SIZES, **options), batch(dtype=torch.float32))


@pytest.mark.slow
def test_fit_is_the_same_in_another_process_and_in_another_order_of_classes():
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import test_feature_losses as t\n"
        "for name in ('nd', 'lelp'):\n"
        "    for key, value in t.make(name, t.torch.float32).state_dict().items():\n"
        "        print(name, key, hashlib.sha256(value.numpy().tobytes()).hexdigest())"
    )
    folder = __file__.rpartition("/")[0]
    runs = {
        subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, timeout=120
        ).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    assert "lelp directions" in runs.pop()
    features, labels = seen(torch.float32)
    whole, mixed = make("lelp", torch.float32), make("lelp", torch.float32)
    order = torch.cat([torch.arange(c, len(labels), 9) for c in range(9)])  # the order within each class stays
    mixed.fit(features[order], labels[order])
    torch.testing.assert_close(mixed.directions, whole.directions)
