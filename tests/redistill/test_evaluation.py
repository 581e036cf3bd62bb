"""Evaluation metrics against loops written from their definitions, and tallies that add in any order."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused, UsageError

from redistill import metrics
from redistill.metrics import evaluate, tally, tally_all

ROWS, CLASSES = 60, 7


@pytest.fixture(params=[0, 1])
def batch(request):
    random = np.random.default_rng(request.param)
    labels = random.integers(0, CLASSES - 1, ROWS)  # the last class has no rows
    hot = np.eye(CLASSES)[labels]
    logits = random.normal(0, 1.5, (ROWS, CLASSES)) + 2 * hot
    teacher = random.normal(0, 1, (ROWS, CLASSES)) + 3 * hot
    return torch.tensor(logits), torch.tensor(labels), torch.tensor(teacher)


def assert_close(got, expected, rel, name):
    """pytest.approx, where None (a rate over no rows) equals None."""
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), name
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, rel, name)
    elif expected is None:
        assert got is None, name
    else:
        assert got == pytest.approx(expected, rel=rel), name


def softmax(row, temperature=1.0):
    top = max(row)
    weights = [math.exp((x - top) / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reference(logits, labels, teacher):
    logits, labels, teacher = logits.tolist(), labels.tolist(), teacher.tolist()
    p = [softmax(row) for row in logits]
    answers = [row.index(max(row)) for row in logits]
    teacher_answers = [row.index(max(row)) for row in teacher]
    right = [a == y for a, y in zip(answers, labels, strict=True)]
    teacher_right = [a == y for a, y in zip(teacher_answers, labels, strict=True)]
    rows = range(len(labels))

    def among(chosen, happened):
        chosen = list(chosen)
        return sum(happened[i] for i in chosen) / len(chosen)

    agree = [a == b for a, b in zip(answers, teacher_answers, strict=True)]
    wrong_rows = [i for i in rows if not teacher_right[i]]
    return {
        "rows": len(labels),
        "top1": among(rows, right),
        "top5": among(rows, [labels[i] in sorted(range(CLASSES), key=lambda c: -logits[i][c])[:5] for i in rows]),
        "nll": -sum(math.log(p[i][labels[i]]) for i in rows) / len(labels),
        "brier": sum((p[i][c] - (c == labels[i])) ** 2 for i in rows for c in range(CLASSES)) / len(labels),
        "ece": slow_ece([max(row) for row in p], right),
        "adaptive_ece": slow_adaptive_ece([max(row) for row in p], right),
        "agreement": among(rows, agree),
        "teacher_top1": among(rows, teacher_right),
        "kl_t1": sum(kl(softmax(teacher[i]), softmax(logits[i])) for i in rows) / len(labels),
        "kl": sum(kl(softmax(teacher[i], 4), softmax(logits[i], 4)) for i in rows) / len(labels),
        "teacher_right_rows": sum(teacher_right),
        "teacher_wrong_rows": len(wrong_rows),
        "top1_where_teacher_right": among([i for i in rows if teacher_right[i]], right),
        "top1_where_teacher_wrong": among(wrong_rows, right),
        "copied": among(wrong_rows, agree),
        "per_class": [
            among([i for i in rows if labels[i] == c], right) if c in labels else None for c in range(CLASSES)
        ],
    }


def slow_ece(confidence, right, bins=15):
    total = 0.0
    for k in range(bins):
        inside = [i for i, c in enumerate(confidence) if k / bins < c <= (k + 1) / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total


def slow_adaptive_ece(confidence, right, bins=15):
    pairs = sorted(zip(confidence, right, strict=True))
    sizes = [len(pairs) // bins + (k < len(pairs) % bins) for k in range(bins)]
    total, at = 0.0, 0
    for size in sizes:
        part, at = pairs[at : at + size], at + size
        total += abs(sum(r for _, r in part) - sum(c for c, _ in part))
    return total / len(pairs)


def test_metrics_are_their_definitions(batch):
    got = evaluate(*batch).to_json()
    for name, expected in reference(*batch).items():
        assert_close(got[name], expected, 1e-6, name)


def test_metrics_in_float32_are_near(batch):
    logits, labels, teacher = batch
    got = evaluate(logits.float(), labels, teacher.float()).to_json()
    for name, expected in reference(*batch).items():
        assert_close(got[name], expected, 1e-4, name)


def test_tallies_add_over_any_split_and_order(batch):
    whole = evaluate(*batch).to_json()
    pieces = [tally(*(x[start:stop] for x in batch)) for start, stop in [(0, 1), (1, 20), (20, 21), (21, ROWS)]]
    forward = (pieces[0] + pieces[1]) + (pieces[2] + pieces[3])
    backward = pieces[3] + (pieces[2] + (pieces[1] + pieces[0]))
    for total in (forward, backward, tally_all((a, b, c) for a, b, c in [batch])):
        got = total.metrics().to_json()
        assert got.keys() == whole.keys()
        for name in whole.keys() - {"reliability"}:
            assert_close(got[name], whole[name], 1e-12, name)


def test_a_tally_travels_between_processes_and_its_metrics_are_json(batch):
    one = pickle.loads(pickle.dumps(tally(*batch)))
    text = json.dumps(one.metrics().to_json(), allow_nan=False)
    assert json.loads(text)["rows"] == ROWS


def test_a_tally_keeps_four_bytes_a_row(batch):
    one = tally(*batch)
    assert sum(piece.nbytes for piece in one.confidence) == 4 * ROWS


def test_reliability_bins_hold_every_row_once_and_give_the_ece(batch):
    metrics = evaluate(*batch)
    assert [b.low for b in metrics.reliability] == pytest.approx([k / 15 for k in range(15)])
    assert sum(b.rows for b in metrics.reliability) == ROWS
    filled = [b for b in metrics.reliability if b.rows]
    assert all(b.low < b.confidence <= b.high for b in filled)
    assert metrics.ece == pytest.approx(sum(b.rows * abs(b.accuracy - b.confidence) for b in filled) / ROWS)
    assert any(b.confidence is None for b in metrics.reliability)


def test_bin_edges_belong_to_the_bin_below():
    confidence = np.array([0.25, 0.5, 0.75, 1.0])
    table = metrics.reliability(confidence, np.ones(4, bool), bins=4)
    assert [b.rows for b in table] == [1, 1, 1, 1]


def test_a_calibrated_student_has_no_ece_and_a_sure_wrong_one_has_all_of_it():
    confidence = np.full(100, 0.75)
    right = np.arange(100) < 75
    assert metrics.ece(confidence, right) == pytest.approx(0, abs=1e-12)
    assert metrics.adaptive_ece(confidence, np.zeros(100, bool)) == pytest.approx(0.75)
    assert metrics.ece(np.ones(10), np.zeros(10, bool)) == 1


def test_adaptive_ece_does_not_depend_on_the_order_of_tied_rows():
    random = np.random.default_rng(0)
    confidence = np.repeat([0.5, 0.9], 20)
    right = random.random(40) < 0.6
    order = random.permutation(40)
    same = metrics.adaptive_ece(confidence[order], right[order], bins=7)
    assert metrics.adaptive_ece(confidence, right, bins=7) == pytest.approx(same)


def test_ties_go_to_the_lower_class():
    logits = torch.zeros(7, 7)
    metrics = evaluate(logits, torch.arange(7))
    assert metrics.top1 == pytest.approx(1 / 7)
    assert metrics.top5 == pytest.approx(5 / 7)


def test_two_classes_and_one_row():
    metrics = evaluate(torch.tensor([[0.0, 1e4]]), torch.tensor([0]), torch.tensor([[1e4, 0.0]]))
    assert metrics.top5 == 1
    assert metrics.top1 == 0
    assert metrics.nll == pytest.approx(1e4)
    assert metrics.brier == pytest.approx(2)
    assert metrics.teacher.kl_t1 == pytest.approx(1e4)
    assert metrics.teacher.kl == pytest.approx(2500)
    assert metrics.teacher.top1_where_teacher_wrong is None


def test_half_precision_logits_are_computed_in_float32(batch):
    logits, labels, teacher = batch
    half = evaluate(logits.bfloat16(), labels, teacher.bfloat16())
    exact = evaluate(logits.bfloat16().float(), labels, teacher.bfloat16().float())
    assert half == exact


def test_no_graph_is_kept(batch):
    logits, labels, teacher = batch
    one = tally(logits.requires_grad_(), labels, teacher)
    assert isinstance(one.nll, float)
    assert logits.grad is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: tally(*b[:2]) + tally(*b), UsageError, "with a teacher"),
        (lambda b: tally(*b) + tally(*b, temperature=2.0), UsageError, "temperatures 4 and 2"),
        (lambda b: tally(*b[:2]) + tally(b[0][:, :6], b[1]), Refused, "7 and 6 classes"),
        (lambda b: tally(b[0], b[1], b[2][:, :5]), Refused, "classes"),
        (lambda b: tally(b[0], b[1] + 5), Refused, "labels must be in"),
        (lambda b: tally(b[0] * math.nan, b[1]), Refused, "rows of the student are not finite"),
        (lambda b: tally(b[0], b[1], b[2] * math.nan), Refused, "teacher rows are not finite"),
        (lambda b: tally_all(x for x in [b] if x is None), Refused, "nothing to evaluate"),
        (lambda b: tally(*b, temperature=0.0), UsageError, "temperature"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(batch, call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(batch)
    assert "\n" not in str(caught.value)
