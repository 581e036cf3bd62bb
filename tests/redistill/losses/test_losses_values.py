"""The other losses against slow references: plain loops in float64, written from the formulas."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from redistill.losses import controls, corrections, curriculum, decoupled, hinton, ranking, relational

ROWS, CLASSES = 6, 7


def softmax(row, temperature=1.0):
    scaled = [x / temperature for x in row]
    top = max(scaled)
    total = sum(math.exp(x - top) for x in scaled)
    return [math.exp(x - top) / total for x in scaled]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def without(row, index):
    return [x for i, x in enumerate(row) if i != index]


def split(row, index):
    return [row[index], sum(without(row, index))]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def corr(x, y):
    mx, my = mean(x), mean(y)
    above = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return above / (math.sqrt(sum((a - mx) ** 2 for a in x)) * math.sqrt(sum((b - my) ** 2 for b in y)) + 1e-8)


def zscore(row):
    return [(x - mean(row)) / (np.std(row, ddof=1) + 1e-7) for x in row]


def ref_kd(z, v, y):
    return 16 * kl(softmax(v, 4), softmax(z, 4))


def ref_dkd(z, v, y):
    s, t = softmax(z, 4), softmax(v, 4)
    target = kl(split(t, y), split(s, y))
    rest = kl(softmax(without(v, y), 4), softmax(without(z, y), 4))
    return 16 * (target + 8 * rest)


def ref_nkd(z, v, y):
    t, s = softmax(v, 3), softmax(z, 3)
    rest = -sum(t[i] / (1 - t[y]) * math.log(s[i] / (1 - s[y])) for i in range(CLASSES) if i != y)
    return -softmax(v)[y] * math.log(softmax(z)[y]) + 3.5 * 9 * rest


def ref_rld(z, v, y, confidence_temperature=4):
    t, s = softmax(v, confidence_temperature), softmax(z, confidence_temperature)
    confidence = confidence_temperature**2 * kl([max(t), 1 - max(t)], [s[y], 1 - s[y]])
    lower = [k for k in range(CLASSES) if v[k] < v[y]]
    rest = kl(softmax([v[k] for k in lower], 4), softmax([z[k] for k in lower], 4)) if lower else 0.0
    return confidence + 8 * 16 * rest


def ref_ttm(z, v, y):
    raised = [p**0.1 for p in softmax(v)]
    return kl([r / sum(raised) for r in raised], softmax(z))


def ref_wttm(z, v, y):
    return sum(p**0.1 for p in softmax(v)) * ref_ttm(z, v, y)


def ref_pld(z, v, y):
    order = [y, *sorted((k for k in range(CLASSES) if k != y), key=lambda k: -v[k])]
    t = softmax(v)
    return sum(
        t[k] * (-z[k] + math.log(sum(math.exp(z[later]) for later in order[place:]))) for place, k in enumerate(order)
    )


def ref_bd_kd(z, v, y):
    t, s = softmax(v, 4), softmax(z, 4)
    entropy_t, entropy_s = -sum(p * math.log(p) for p in t), -sum(p * math.log(p) for p in s)
    return 16 * ((3 if entropy_t > entropy_s else 1) * kl(t, s) + (3 if entropy_s > entropy_t else 1) * kl(s, t))


def ref_taid(z, v, y):
    return kl(softmax([0.6 * a + 0.4 * b for a, b in zip(z, v, strict=True)]), softmax(z))


def ref_pearson(z, v, y):
    return 16 * (1 - corr(softmax(z, 4), softmax(v, 4)))


def ref_pearson_of_logits(z, v, y):
    return 1 - corr(z, v)


def ref_spearman(z, v, y):
    def ranks(row):
        x = zscore(row)
        return [
            1 + sum(1 / (1 + math.exp(-(x[j] - x[i]) / 0.1)) for j in range(CLASSES) if j != i) for i in range(CLASSES)
        ]

    return 1 - corr(ranks(z), ranks(v))


def ref_swap_kd(z, v, y):
    v = list(v)
    best = v.index(max(v))
    v[best], v[y] = v[y], v[best]
    return ref_kd(z, v, y)


def ref_rc(z, v, y):
    raised = list(z)
    raised[y] += max(z)
    return ref_kd(z, v, y) + 0.1 * 16 * kl(softmax(raised, 4), softmax(z, 4))


def ref_logit_mse(z, v, y):
    return mean((a - b) ** 2 for a, b in zip(z, v, strict=True))


def ref_logit_mse_centered(z, v, y):
    return mean((a - mean(z) - b + mean(v)) ** 2 for a, b in zip(z, v, strict=True))


def ref_mld(z, v, y):
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    return sum(kl([sigmoid(b), 1 - sigmoid(b)], [sigmoid(a), 1 - sigmoid(a)]) for a, b in zip(z, v, strict=True))


def ref_label_smoothing(z, v, y):
    target = [0.1 / CLASSES + 0.9 * (k == y) for k in range(CLASSES)]
    return -sum(p * math.log(q) for p, q in zip(target, softmax(z), strict=True))


def ref_tf_kd(z, v, y):
    target = softmax([0.99 if k == y else 0.01 / (CLASSES - 1) for k in range(CLASSES)], 20)
    return 100 * mean(p * math.log(p / q) for p, q in zip(target, softmax(z), strict=True))


def ref_virtual_teacher(z, v, y):
    virtual = [math.log(0.99) if k == y else math.log(0.01 / (CLASSES - 1)) for k in range(CLASSES)]
    return 400 * kl(softmax(virtual, 20), softmax(z, 20))


PER_ROW = {
    "kd": (hinton.kd, {}, ref_kd),
    "dkd": (decoupled.dkd, {}, ref_dkd),
    "nkd": (decoupled.nkd, {}, ref_nkd),
    "rld": (decoupled.rld, {}, ref_rld),
    "rld at T_a = 1": (
        decoupled.rld,
        {"confidence_temperature": 1.0},
        lambda z, v, y: ref_rld(z, v, y, confidence_temperature=1),
    ),
    "ttm": (hinton.ttm, {}, ref_ttm),
    "wttm": (hinton.wttm, {}, ref_wttm),
    "pld": (ranking.pld, {}, ref_pld),
    "bd_kd": (hinton.bd_kd, {}, ref_bd_kd),
    "taid": (curriculum.taid, {}, ref_taid),
    "pearson": (relational.pearson, {}, ref_pearson),
    "pearson of logits": (relational.pearson, {"of": "logits"}, ref_pearson_of_logits),
    "spearman": (relational.spearman, {}, ref_spearman),
    "swap_kd": (corrections.swap_kd, {}, ref_swap_kd),
    "rc": (corrections.rc, {}, ref_rc),
    "logit_mse": (hinton.logit_mse, {}, ref_logit_mse),
    "logit_mse centered": (hinton.logit_mse, {"centered": True}, ref_logit_mse_centered),
    "mld": (hinton.mld, {}, ref_mld),
    "label_smoothing": (controls.label_smoothing, {}, ref_label_smoothing),
    "virtual_teacher": (controls.virtual_teacher, {}, ref_virtual_teacher),
    "tf_kd": (controls.tf_kd, {}, ref_tf_kd),
}
LABELLED = {
    "dkd",
    "nkd",
    "rld",
    "rld at T_a = 1",
    "pld",
    "swap_kd",
    "rc",
    "label_smoothing",
    "virtual_teacher",
    "tf_kd",
}


@pytest.fixture(params=[1, 2, 3])
def batch(request):
    """Student, teacher, labels. Rows 0-1: the teacher is right; row 2: the teacher ranks the true class last."""
    random = np.random.default_rng(request.param)
    z, v = random.normal(0, 2, (ROWS, CLASSES)), random.normal(0, 3, (ROWS, CLASSES))
    y = random.integers(0, CLASSES, ROWS)
    y[:2], y[2] = v[:2].argmax(1), v[2].argmin()
    return z, v, y


def tensors(batch, dtype=torch.float64):
    z, v, y = batch
    return torch.tensor(z, dtype=dtype), torch.tensor(v, dtype=dtype), torch.tensor(y)


@pytest.mark.parametrize("name", PER_ROW)
def test_row_loss_is_its_formula(name, batch):
    loss, options, reference = PER_ROW[name]
    student, teacher, labels = tensors(batch)
    keywords = {**options, "labels": labels} if name in LABELLED else options
    rows = loss(student, teacher, **keywords, reduction="none")
    expected = [reference(z, v, y) for z, v, y in zip(*(a.tolist() for a in batch), strict=True)]
    np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert loss(student, teacher, **keywords).item() == pytest.approx(mean(expected))
    assert loss(student, teacher, **keywords, reduction="sum").item() == pytest.approx(sum(expected))
    single = loss(student.float(), teacher.float(), **keywords, reduction="none")
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-4, atol=2e-4)


def probabilities(rows, temperature):
    return [softmax(row, temperature) for row in rows]


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def gram(rows):
    return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]


def squared_gap(x, y):
    return sum((a - b) ** 2 for p, q in zip(x, y, strict=True) for a, b in zip(p, q, strict=True))


def ref_dist(z, v, y):
    s, t = probabilities(z, 4), probabilities(v, 4)
    inter = 1 - mean(corr(a, b) for a, b in zip(s, t, strict=True))
    intra = 1 - mean(corr(a, b) for a, b in zip(columns(s), columns(t), strict=True))
    return 16 * (inter + intra)


def ref_mlkd_class(z, v, y):
    return squared_gap(gram(columns(probabilities(v, 4))), gram(columns(probabilities(z, 4)))) / CLASSES


def ref_mlkd_batch(z, v, y):
    return squared_gap(gram(probabilities(v, 4)), gram(probabilities(z, 4))) / len(z)


def ref_luminet(z, v, y):
    def scores(rows):
        return columns([[(x - mean(c)) / math.sqrt(np.var(c) + 1e-5) for x in c] for c in columns(rows)])

    return 33**2 * mean(kl(softmax(t, 4), softmax(s, 4)) for t, s in zip(scores(v), scores(z), strict=True))


def ref_sinkhorn(z, v, y):
    s, t = probabilities(z, 2), probabilities(v, 2)
    cost = [[sum(abs(a - b) for a, b in zip(p, q, strict=True)) for q in t] for p in s]
    plan = [[math.exp(-w / 0.1) for w in row] for row in cost]
    for _ in range(20):
        plan = [[k / sum(row) for k in row] for row in plan]
        plan = columns([[k / sum(column) for k in column] for column in columns(plan)])
    return sum(p * w for a, b in zip(plan, cost, strict=True) for p, w in zip(a, b, strict=True))


def ref_label_revision(z, v, y):
    right, wrong = [], []
    for student, teacher, label in zip(z, v, y, strict=True):
        t, s = softmax(teacher), softmax(student)
        if t.index(max(t)) == label:
            right.append(-math.log(s[label]) + 4 * mean((a - b) ** 2 for a, b in zip(student, teacher, strict=True)))
        else:
            beta = 0.8 / (max(t) - t[label] + 1)
            wrong.append(mean((s[k] - beta * t[k] - (1 - beta) * (k == label)) ** 2 for k in range(CLASSES)))
    return mean(right or [0.0]) + mean(wrong or [0.0])


def ref_r2kd(z, v, y):
    def cos(a, b):
        size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return abs(sum(p * q for p, q in zip(a, b, strict=True))) / (size + 1e-8)

    s, t = probabilities(z, 4), probabilities(v, 4)
    of_rows = 1 - mean(cos(a, b) for a, b in zip(s, t, strict=True))
    return 16 * (of_rows + 1 - mean(cos(a, b) for a, b in zip(columns(s), columns(t), strict=True)))


def ref_cwtm(z, v, y):
    confidence = [max(softmax(row)) for row in v]
    return sum(
        c / sum(confidence) * -math.log(softmax(row)[label]) for c, row, label in zip(confidence, z, y, strict=True)
    )


def ref_topkd(z, v, y, k=2, gain=0.5, lift=0.1, wrong=0.3):
    def cos(a, b):
        size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(p * q for p, q in zip(a, b, strict=True)) / size

    scaled, agreement = [], []
    for student, teacher, label in zip(z, v, y, strict=True):
        order = sorted(range(CLASSES), key=lambda c: -teacher[c])
        gap = mean(teacher[c] for c in order[:k]) - mean(teacher[c] for c in order[k:])
        row = list(teacher)
        for rank, c in enumerate(order[:k]):
            row[c] = teacher[c] * (1 + gain * (k - rank) / k) + lift * gap
        if label not in order[:k]:
            row[label] = teacher[label] + lift * gap
        if order[0] != label:
            row[label] += (wrong - lift) * gap
        scaled.append(row)
        groups = (order[:k], order[-k:], order[k:-k])
        agreement.append(sum(cos([student[c] for c in g], [row[c] for c in g]) for g in groups))
    similarity = [[cos(a, b) / 0.1 for b in scaled] for a in z]
    by_student = mean(-math.log(softmax(row)[i]) for i, row in enumerate(similarity))
    by_teacher = mean(-math.log(softmax(row)[i]) for i, row in enumerate(columns(similarity)))
    return 1 - mean(agreement) + 0.5 * (by_student + by_teacher)


SCALING = {"k": 2, "gain": 0.5, "lift": 0.1, "lift_when_wrong": 0.3}
PER_BATCH = {
    "dist": (relational.dist, {}, ref_dist),
    "mlkd_class": (relational.mlkd_class, {}, ref_mlkd_class),
    "mlkd_batch": (relational.mlkd_batch, {}, ref_mlkd_batch),
    "sinkhorn": (relational.sinkhorn, {}, ref_sinkhorn),
    "luminet": (hinton.luminet, {}, ref_luminet),
    "cwtm": (controls.cwtm, {}, ref_cwtm),
    "r2kd": (relational.r2kd, {}, ref_r2kd),
    "label_revision": (corrections.label_revision, {}, ref_label_revision),
    "topkd": (ranking.topkd, SCALING, ref_topkd),
    "topkd unscaled": (ranking.topkd, {"k": 2}, lambda z, v, y: ref_topkd(z, v, y, gain=0, lift=0, wrong=0)),
}
STATISTICS = {"dist", "r2kd", "mlkd_class", "mlkd_batch", "sinkhorn", "topkd"}


@pytest.mark.parametrize("name", PER_BATCH)
def test_batch_loss_is_its_formula(name, batch):
    loss, options, reference = PER_BATCH[name]
    student, teacher, labels = tensors(batch)
    keywords = {**options, "labels": labels} if name.startswith(("cwtm", "topkd", "label_revision")) else options
    expected = reference(*(a.tolist() for a in batch))
    assert loss(student, teacher, **keywords).item() == pytest.approx(expected, rel=1e-9)
    assert loss(student, teacher, **keywords, reduction="sum").item() == pytest.approx(ROWS * expected, rel=1e-9)
    assert loss(student.float(), teacher.float(), **keywords).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_a_statistic_of_the_batch_has_no_row_values(name, batch):
    loss, options, _ = PER_BATCH[name]
    student, teacher, labels = tensors(batch)
    keywords = {**options, "labels": labels} if name == "topkd" else options
    with pytest.raises(ValueError, match="statistic of the batch"):
        loss(student, teacher, **keywords, reduction="none")


def test_standardised_rows_are_z_scores(batch):
    z, _, _ = batch
    got = hinton.standardize(torch.tensor(z))
    np.testing.assert_allclose(got.numpy(), [zscore(row) for row in z.tolist()], rtol=1e-9)


def test_a_row_without_deviation_standardises_to_zero_with_a_small_gradient():
    flat = torch.full((2, 5), 3.0, requires_grad=True)
    rows = hinton.standardize(flat)
    assert (rows == 0).all()
    rows[:, 0].sum().backward()
    assert flat.grad.abs().max() <= 1.0


def test_class_term_of_mlkd_does_not_cancel_near_the_teacher():
    random = np.random.default_rng(0)
    v = random.normal(0, 3, (8, 50))
    z = v + random.normal(0, 1e-4, v.shape)
    got = relational.mlkd_class(torch.tensor(z).float(), torch.tensor(v).float(), temperature=1.0)
    t, s = scipy.special.softmax(v, 1), scipy.special.softmax(z, 1)
    exact = ((t.T @ t - s.T @ s) ** 2).sum() / 50
    assert got.item() == pytest.approx(exact, rel=1e-2)
    assert got.item() > 0


def test_spearman_becomes_the_rank_correlation_as_its_strength_goes_to_zero(batch):
    student, teacher, _ = tensors(batch)
    rows = relational.spearman(student, teacher, strength=1e-5, reduction="none")
    exact = [1 - scipy.stats.spearmanr(z, v).statistic for z, v in zip(batch[0], batch[1], strict=True)]
    np.testing.assert_allclose(rows.numpy(), exact, atol=1e-6)


def test_spearman_of_the_top_is_spearman_of_the_teachers_highest_classes(batch):
    student, teacher, _ = tensors(batch)
    highest = teacher.topk(3, dim=1).indices
    got = relational.spearman(student, teacher, top=3)
    assert got.item() == pytest.approx(
        relational.spearman(student.gather(1, highest), teacher.gather(1, highest)).item()
    )


def test_spearman_refuses_what_would_not_fit_in_memory():
    logits = torch.zeros(2, 21_843)
    with pytest.raises(ValueError, match="set top"):
        relational.spearman(logits, logits)


def test_pld_with_a_one_hot_teacher_is_cross_entropy_and_with_a_flat_one_listmle(batch):
    student, _, labels = tensors(batch)
    one_hot = torch.zeros_like(student).scatter(1, labels[:, None], 1e4)
    expected = torch.nn.functional.cross_entropy(student, labels)
    assert ranking.pld(student, one_hot, labels=labels).item() == pytest.approx(expected.item())
    first = torch.arange(CLASSES)[None].expand(ROWS, -1)
    zeros = torch.zeros(ROWS, dtype=torch.long)
    tails = student.gather(1, first).flip(1).logcumsumexp(1).flip(1)
    listmle = (tails - student).mean(1).mean()
    assert ranking.pld(student, torch.zeros_like(student), labels=zeros).item() == pytest.approx(listmle.item())


def test_dkpp_keeps_the_top_class_and_permutes_the_rest():
    random = np.random.default_rng(0)
    teacher = torch.tensor(random.normal(0, 3, (200, 9)))
    shuffled = controls.permute_others(teacher)
    torch.testing.assert_close(shuffled.sort(1).values, teacher.sort(1).values, rtol=0, atol=0)
    best = teacher.argmax(1)
    assert (shuffled.argmax(1) == best).all()
    moved = (shuffled != teacher).double().mean(0)
    assert moved.min() > 0.5  # 8 of 9 columns hold a non-top class, 7/8 of which move


def test_dkpp_shuffle_is_uniform_over_the_orders():
    random = np.random.default_rng(0)
    teacher = torch.tensor(random.normal(0, 1, (6000, 4)))
    teacher[:, 0] = 10.0
    teacher[:, 1:] = teacher[:, 1:].sort(1).values
    ranks = controls.permute_others(teacher)[:, 1:].argsort(1)
    counts = torch.bincount((ranks * torch.tensor([9, 3, 1])).sum(1))
    counts = counts[counts > 0].numpy()
    assert len(counts) == 6
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_dkpp_is_a_function_of_the_row_and_the_seed(batch):
    student, teacher, _ = tensors(batch)
    torch.manual_seed(1)
    once = controls.dkpp(student, teacher, reduction="none")
    torch.manual_seed(2)
    reversed_rows = controls.dkpp(student.flip(0), teacher.flip(0), reduction="none").flip(0)
    torch.testing.assert_close(once, reversed_rows)
    assert not torch.equal(controls.permute_others(teacher, 0), controls.permute_others(teacher, 1))
    shuffled = controls.permute_others(teacher)
    expected = [kl(softmax(v), softmax(z)) for v, z in zip(shuffled.tolist(), student.tolist(), strict=True)]
    np.testing.assert_allclose(once.numpy(), expected)


def test_swap_does_not_change_correct_rows(batch):
    _, teacher, labels = tensors(batch)
    swapped = corrections.swap(teacher, labels)
    assert (swapped.argmax(1) == labels).all()
    assert torch.equal(swapped[:2], teacher[:2])


@pytest.mark.parametrize("right", [True, False])
def test_label_revision_of_one_group_is_the_mean_of_its_rows(batch, right):
    z, v, _ = batch
    y = v.argmax(1) if right else v.argmin(1)
    student, teacher, labels = tensors((z, v, y))
    expected = ref_label_revision(z.tolist(), v.tolist(), y.tolist())
    rows = corrections.label_revision(student, teacher, labels=labels, reduction="none")
    assert rows.mean().item() == pytest.approx(expected, rel=1e-9)


def test_the_virtual_teacher_of_the_paper_and_that_of_its_code_have_their_minima_where_they_say(batch):
    _, _, labels = tensors(batch)

    def minimum(loss):
        logits = torch.zeros(ROWS, 100, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def step():
            optimiser.zero_grad()
            value = loss(logits, logits, labels=labels)
            value.backward()
            return value

        optimiser.step(step)
        return logits.detach().softmax(1)[torch.arange(ROWS), labels].tolist()

    assert minimum(controls.virtual_teacher) == pytest.approx([0.99] * ROWS, abs=1e-3)
    assert minimum(controls.tf_kd) == pytest.approx([0.0105] * ROWS, abs=1e-4)


def test_a_uniform_virtual_teacher_is_kd_from_equal_logits(batch):
    student, teacher, labels = tensors(batch)
    got = controls.virtual_teacher(student, teacher, labels=labels, confidence=1 / CLASSES, temperature=4.0)
    assert got.item() == pytest.approx(hinton.kd(student, torch.zeros_like(student)).item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: hinton.kd(s, t, temperature=0.0), "temperature must be"),
        (lambda s, t: hinton.kd(s, t, temperature=math.nan), "temperature must be"),
        (lambda s, t: hinton.ttm(s, t, gamma=-1.0), "gamma must be"),
        (lambda s, t: relational.sinkhorn(s, t, rounds=0), "rounds must be at least 1"),
        (lambda s, t: relational.pearson(s, t, of="ranks"), "of must be"),
        (lambda s, t: decoupled.dkd(s, t, labels=None), "needs labels"),
        (lambda s, t: hinton.kd(s, t, reduction="average"), "unknown reduction"),
        (lambda s, t: hinton.kd(s[:, :3], t), "classes"),
        (
            lambda s, t: controls.virtual_teacher(s, t, labels=torch.zeros(4, dtype=torch.long), confidence=1.0),
            "confidence",
        ),
        (lambda s, t: controls.label_smoothing(s, t, labels=torch.zeros(4, dtype=torch.long), smoothing=2), "0..1"),
    ],
)
def test_invalid_options_and_shapes_are_refused_in_one_line(call, message):
    with pytest.raises(Exception, match=message) as caught:
        call(torch.zeros(4, 5), torch.zeros(4, 5))
    assert caught.type.__module__ == "redistill_cache.errors"
    assert "\n" not in str(caught.value)
