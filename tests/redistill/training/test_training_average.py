"""The moving average of weights is torch's, and so is its state in a checkpoint."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from redistill.training.average import AveragedWeights


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def train_steps(student: nn.Module, steps: int, *averages) -> None:
    """Random changes of the weights, each followed by an update of the averages."""
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        student(torch.randn(8, 3, 4, 4, generator=generator))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        for average in averages:
            average(student)


def floats(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}


def test_it_is_that_of_torch_to_the_bit():
    student = network()
    reference = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average = AveragedWeights(student, 0.9)
    train_steps(student, 5, reference.update_parameters, average.update)
    expected = floats(reference.module)
    assert len(expected) == 8  # running statistics too
    for name, value in floats(average.module).items():
        assert torch.equal(value, expected[name]), name
    assert int(average.module[1].num_batches_tracked) == 5
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_it_continues_from_a_checkpoint_of_torchs_class_and_back():
    student = network()
    reference = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train_steps(student, 3, reference.update_parameters)
    average = AveragedWeights(network(), 0.9)
    average.load_state_dict(reference.state_dict())
    assert average.steps == 3
    train_steps(student, 2, reference.update_parameters, average.update)
    for name, value in floats(average.module).items():
        assert torch.equal(value, floats(reference.module)[name]), name
    back = AveragedModel(network(), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    back.load_state_dict(average.state_dict())
    assert int(back.n_averaged) == 5
