"""Metrics against loops written from their definitions, and sums that can be added in any order."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused, UsageError

from redistill import metrics
from redistill.metrics import batch_sums

ROWS, CLASSES = 60, 7


@pytest.fixture(params=[0, 1])
def batch(request):
    random = np.random.default_rng(request.param)
    labels = random.integers(0, CLASSES - 1, ROWS)  # the last class has no rows
    hot = np.eye(CLASSES)[labels]
    logits = random.normal(0, 1.5, (ROWS, CLASSES)) + 2 * hot
    teacher = random.normal(0, 1, (ROWS, CLASSES)) + 3 * hot
    return torch.tensor(logits), torch.tensor(labels), torch.tensor(teacher)


def metrics_of(logits, labels, teacher_logits=None):
    return batch_sums(logits, labels, teacher_logits).metrics()


def assert_close(actual, expected, rel, name):
    """pytest.approx, where None (a rate over no rows) equals None."""
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), name
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, rel, name)
    elif expected is None:
        assert actual is None, name
    else:
        assert actual == pytest.approx(expected, rel=rel), name


def softmax(row, temperature=1.0):
    top = max(row)
    weights = [math.exp((x - top) / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reference(logits, labels, teacher):
    logits, labels, teacher = logits.tolist(), labels.tolist(), teacher.tolist()
    p = [softmax(row) for row in logits]
    predictions = [row.index(max(row)) for row in logits]
    teacher_predictions = [row.index(max(row)) for row in teacher]
    right = [a == y for a, y in zip(predictions, labels, strict=True)]
    teacher_right = [a == y for a, y in zip(teacher_predictions, labels, strict=True)]
    rows = range(len(labels))

    def rate(subset, events):
        subset = list(subset)
        return sum(events[i] for i in subset) / len(subset)

    agree = [a == b for a, b in zip(predictions, teacher_predictions, strict=True)]
    teacher_wrong_rows = [i for i in rows if not teacher_right[i]]
    return {
        "rows": len(labels),
        "top1": rate(rows, right),
        "top5": rate(rows, [labels[i] in sorted(range(CLASSES), key=lambda c: -logits[i][c])[:5] for i in rows]),
        "nll": -sum(math.log(p[i][labels[i]]) for i in rows) / len(labels),
        "brier": sum((p[i][c] - (c == labels[i])) ** 2 for i in rows for c in range(CLASSES)) / len(labels),
        "ece": slow_ece([max(row) for row in p], right),
        "adaptive_ece": slow_adaptive_ece([max(row) for row in p], right),
        "agreement": rate(rows, agree),
        "teacher_top1": rate(rows, teacher_right),
        "kl_t1": sum(kl(softmax(teacher[i]), softmax(logits[i])) for i in rows) / len(labels),
        "kl": sum(kl(softmax(teacher[i], 4), softmax(logits[i], 4)) for i in rows) / len(labels),
        "teacher_right_rows": sum(teacher_right),
        "teacher_wrong_rows": len(teacher_wrong_rows),
        "top1_where_teacher_right": rate([i for i in rows if teacher_right[i]], right),
        "top1_where_teacher_wrong": rate(teacher_wrong_rows, right),
        "copied": rate(teacher_wrong_rows, agree),
        "per_class": [
            rate([i for i in rows if labels[i] == c], right) if c in labels else None for c in range(CLASSES)
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


def test_metrics_follow_their_definitions(batch):
    actual = metrics_of(*batch).to_json()
    for name, expected in reference(*batch).items():
        assert_close(actual[name], expected, 1e-6, name)


def test_metrics_in_float32_are_close(batch):
    logits, labels, teacher = batch
    actual = metrics_of(logits.float(), labels, teacher.float()).to_json()
    for name, expected in reference(*batch).items():
        assert_close(actual[name], expected, 1e-4, name)


def test_sums_add_over_any_split_and_order(batch):
    whole = metrics_of(*batch).to_json()
    pieces = [batch_sums(*(x[start:stop] for x in batch)) for start, stop in [(0, 1), (1, 20), (20, 21), (21, ROWS)]]
    forward = (pieces[0] + pieces[1]) + (pieces[2] + pieces[3])
    backward = pieces[3] + (pieces[2] + (pieces[1] + pieces[0]))
    for total in (forward, backward):
        actual = total.metrics().to_json()
        assert actual.keys() == whole.keys()
        for name in whole.keys() - {"reliability"}:
            assert_close(actual[name], whole[name], 1e-12, name)


def test_sums_can_be_pickled_and_metrics_are_json(batch):
    sums = pickle.loads(pickle.dumps(batch_sums(*batch)))
    text = json.dumps(sums.metrics().to_json(), allow_nan=False)
    assert json.loads(text)["rows"] == ROWS


def test_sums_hold_four_bytes_per_row(batch):
    sums = batch_sums(*batch)
    assert sum(part.nbytes for part in sums.confidence) == 4 * ROWS


def test_reliability_bins_count_every_row_once_and_give_the_ece(batch):
    metrics = metrics_of(*batch)
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


def test_ece_is_zero_for_a_calibrated_student_and_one_for_a_confidently_wrong_one():
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


def test_ties_are_broken_by_the_lower_class():
    logits = torch.zeros(7, 7)
    metrics = metrics_of(logits, torch.arange(7))
    assert metrics.top1 == pytest.approx(1 / 7)
    assert metrics.top5 == pytest.approx(5 / 7)


def test_two_classes_and_one_row():
    metrics = metrics_of(torch.tensor([[0.0, 1e4]]), torch.tensor([0]), torch.tensor([[1e4, 0.0]]))
    assert metrics.top5 == 1
    assert metrics.top1 == 0
    assert metrics.nll == pytest.approx(1e4)
    assert metrics.brier == pytest.approx(2)
    assert metrics.teacher.kl_t1 == pytest.approx(1e4)
    assert metrics.teacher.kl == pytest.approx(2500)
    assert metrics.teacher.top1_where_teacher_wrong is None


def test_half_precision_logits_are_computed_in_float32(batch):
    logits, labels, teacher = batch
    half = metrics_of(logits.bfloat16(), labels, teacher.bfloat16())
    exact = metrics_of(logits.bfloat16().float(), labels, teacher.bfloat16().float())
    assert half == exact


def test_no_graph_is_built(batch):
    logits, labels, teacher = batch
    sums = batch_sums(logits.requires_grad_(), labels, teacher)
    assert isinstance(sums.nll, float)
    assert logits.grad is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: batch_sums(*b[:2]) + batch_sums(*b), UsageError, "with and without teacher logits"),
        (lambda b: batch_sums(*b) + batch_sums(*b, temperature=2.0), UsageError, "temperatures 4 and 2"),
        (lambda b: batch_sums(*b[:2]) + batch_sums(b[0][:, :6], b[1]), Refused, "7 and 6 classes"),
        (lambda b: batch_sums(b[0], b[1], b[2][:, :5]), Refused, "classes"),
        (lambda b: batch_sums(b[0], b[1] + 5), Refused, "labels must be in"),
        (lambda b: batch_sums(b[0] * math.nan, b[1]), Refused, "rows of the student are not finite"),
        (lambda b: batch_sums(b[0], b[1], b[2] * math.nan), Refused, "teacher rows are not finite"),
        (lambda b: batch_sums(*b, temperature=0.0), UsageError, "temperature"),
    ],
)
def test_mismatched_batches_are_refused_in_one_line(batch, call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(batch)
    assert "\n" not in str(caught.value)
