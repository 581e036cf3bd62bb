"""The requirements in the catalogue match the behaviour of the losses."""

import inspect

import pytest
import torch
from redistill_cache.codecs.floats import Float16Codec
from redistill_cache.errors import Refused

from redistill.losses.catalogue import CATALOGUE, make_loss
from redistill.losses.curriculum import TrainingProgress
from redistill.losses.objective import Objective

ON_LOGITS = sorted(name for name, entry in CATALOGUE.items() if not entry.on_features)


def rows(count=6, classes=8):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (count,), generator=generator)
    labels[: count // 2] = teacher.argmax(1)[: count // 2]
    return student, teacher, labels


def value(name, student, teacher, labels, reduction="batchmean"):
    entry, loss = make_loss(name)
    options = {"labels": labels} if entry.labels else {}
    if entry.is_module:
        loss.eval()
        options["progress"] = TrainingProgress()
    return loss(student, teacher, **options, reduction=reduction)


# The permutation of DKPP is drawn from the bits of the row, which a shift changes; its distribution is the same.
@pytest.mark.parametrize("name", sorted(set(ON_LOGITS) - {"dkpp"}))
def test_the_teachers_shift_matters_exactly_for_the_losses_that_list_it(name):
    student, teacher, labels = rows()
    shifted = value(name, student, teacher - 5.0, labels)
    assert torch.isclose(shifted, value(name, student, teacher, labels)).item() != CATALOGUE[name].shift


@pytest.mark.parametrize("name", ON_LOGITS)
def test_a_loss_without_batch_statistics_is_the_mean_over_single_rows(name):
    student, teacher, labels = rows()
    whole = value(name, student, teacher, labels)
    alone = torch.stack([value(name, student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert torch.isclose(whole, alone.mean()).item() != CATALOGUE[name].batch_statistics


@pytest.mark.parametrize("name", ON_LOGITS)
def test_row_values_exist_exactly_for_the_losses_that_list_them(name):
    student, teacher, labels = rows()
    if CATALOGUE[name].per_row:
        assert value(name, student, teacher, labels, "none").shape == (6,)
    else:
        with pytest.raises(ValueError, match="statistic of the batch"):
            value(name, student, teacher, labels, "none")


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_docstrings_begin_with_a_summary(name):
    assert len(inspect.getdoc(CATALOGUE[name].make).partition("\n")[0]) > 20


@pytest.mark.parametrize("spec", ["logit_mse", "mld", "label_revision", "topkd"])
def test_losses_on_raw_logits_refuse_an_archive_without_the_shift(spec):
    objective = Objective([spec])
    objective.refuse_codec(Float16Codec(10, keep_shift=True))
    with pytest.raises(Refused, match=f"'{spec}' compares raw logits"):
        objective.refuse_codec(Float16Codec(10))


@pytest.mark.parametrize("spec", ["power", "dkd", "logit_mse?centered=true", "mld?standardize=true"])
def test_losses_that_do_not_depend_on_the_shift_accept_any_archive(spec):
    objective = Objective([spec])
    objective.refuse_codec(Float16Codec(10))
