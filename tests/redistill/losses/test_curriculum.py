"""TAID's schedule and CTKD's learned temperature: values, gradients and saved state."""

import math

import pytest
import torch

from redistill.losses import curriculum, hinton
from redistill.losses.curriculum import TrainingProgress
from tests.random_logits import random_logits


def logits():
    return random_logits(4, 5, spread=3.0, dtype=torch.float32)


def reference_mixes(losses, fractions, start=0.4, end=1.0, momentum=0.99, rate=5e-4):
    """The schedule in plain Python: the mix each loss is computed with, and the one after the last."""
    mix, trend, previous, used = start, 0.0, None, []
    for loss, fraction in zip(losses, fractions, strict=True):
        used.append(mix)
        step = 0.0
        if previous is not None:
            trend = momentum * trend + (1 - momentum) * (previous - loss) / previous
            step = rate / (1 + math.exp(-trend)) * (1 - mix)
        mix = min(end, max(start + (end - start) * fraction, mix + step))
        previous = loss
    return [*used, mix]


@pytest.mark.parametrize("total", [10.0, 1e5])  # the linear ramp leads, the adaptive step leads
def test_taid_follows_its_published_rule(total):
    loss = curriculum.Taid(rate=0.05 if total > 1e3 else 5e-4)
    steps = [TrainingProgress(epoch, total) for epoch in range(8)]
    losses, mixes = [], []
    for step in range(8):
        student, teacher = logits()
        mixes.append(loss.mix.item())
        value = loss(student * (1 + step), teacher, progress=steps[step])
        expected = curriculum.taid(student * (1 + step), teacher, mix=mixes[-1])
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        losses.append(value.item())
    expected = reference_mixes(losses, [step.fraction for step in steps], rate=loss.rate)
    assert [*mixes, loss.mix.item()] == pytest.approx(expected, rel=1e-5)


def test_taid_does_not_change_in_evaluation_and_is_saved():
    loss = curriculum.Taid()
    student, teacher = logits()
    for epoch in range(3):
        loss(student, teacher, progress=TrainingProgress(epoch, 10))
    assert loss.mix > 0.4
    again = curriculum.Taid()
    again.load_state_dict(loss.state_dict())
    assert {name: value.item() for name, value in again.named_buffers()} == {
        name: value.item() for name, value in loss.named_buffers()
    }
    loss.eval()
    before = loss.mix.item()
    loss(student, teacher, progress=TrainingProgress(9, 10))
    assert loss.mix.item() == before


def test_taid_with_a_loss_of_zero_stays_finite():
    loss = curriculum.Taid()
    _, teacher = logits()
    for epoch in range(3):
        assert loss(teacher, teacher, progress=TrainingProgress(epoch, 10)).item() == 0
    assert loss.mix.item() == pytest.approx(0.4 + 0.6 * 0.2)


def test_taid_with_mix_one_is_kd_and_with_mix_zero_has_no_gradient():
    student, teacher = logits()
    student.requires_grad_()
    torch.testing.assert_close(
        curriculum.taid(student, teacher, mix=1.0, temperature=2.0), hinton.kd(student, teacher, temperature=2.0)
    )
    curriculum.taid(student, teacher, mix=0.0).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


def test_taid_reduction_none_and_sum_agree():
    student, teacher = logits()
    loss = curriculum.Taid().eval()
    rows = loss(student, teacher, progress=TrainingProgress(), reduction="none")
    assert rows.shape == (4,)
    torch.testing.assert_close(loss(student, teacher, progress=TrainingProgress(), reduction="sum"), rows.sum())


def test_ctkd_is_kd_at_its_temperature():
    student, teacher = logits()
    loss = curriculum.CurriculumTemperature()
    temperature = 1 + 20 / (1 + math.exp(-1))
    assert loss.temperature.item() == pytest.approx(temperature)
    value = loss(student, teacher, progress=TrainingProgress(3, 10))
    assert value.item() == pytest.approx(hinton.kd(student, teacher, temperature=temperature).item(), rel=1e-5)


@pytest.mark.parametrize(("epoch", "factor"), [(0, 0.0), (5, -0.5), (10, -1.0), (100, -1.0)])
def test_ctkd_reverses_the_gradient_of_its_temperature(epoch, factor):
    student, teacher = (x.double() for x in logits())
    loss = curriculum.CurriculumTemperature().double()
    loss(student, teacher, progress=TrainingProgress(epoch, 100)).backward()
    h = 1e-4
    with torch.no_grad():
        loss.theta += h
        above = loss(student, teacher, progress=TrainingProgress())
        loss.theta -= 2 * h
        below = loss(student, teacher, progress=TrainingProgress())
    assert loss.theta.grad.item() == pytest.approx(factor * ((above - below) / (2 * h)).item(), rel=1e-5, abs=1e-12)


def test_ctkd_temperature_ascends_the_loss_that_the_student_descends():
    student, teacher = logits()
    loss = curriculum.CurriculumTemperature()
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.05)
    before = loss(student, teacher, progress=TrainingProgress(20, 100)).item()
    for _ in range(20):
        optimiser.zero_grad()
        loss(student, teacher, progress=TrainingProgress(20, 100)).backward()
        optimiser.step()
    assert loss(student, teacher, progress=TrainingProgress(20, 100)).item() > before
