"""Every loss of the catalogue on a GPU, a simulated one, under autocast: the values of the CPU, and no host sync."""

from __future__ import annotations

import pytest
import torch

from redistill.losses import CATALOGUE, Objective
from redistill.losses.curriculum import TrainingProgress
from tests.simulated_cuda import simulated_cuda

GPU = torch.device("cuda", 0)


def step(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of the student's logits."""
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(12, 10, generator=generator)).to(device).requires_grad_()
    teacher = (5 * torch.randn(12, 10, generator=generator)).to(device)
    labels = torch.randint(0, 10, (12,), generator=generator).to(device)
    torch.manual_seed(0)
    objective = Objective([f"{name}?weight=1", "ce?weight=0.5"]).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = objective(student * 1, teacher, labels, progress=TrainingProgress(1.5, 10.0))
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_a_loss_on_a_gpu(name: str):
    expected, expected_gradient = step(name, torch.device("cpu"))
    with simulated_cuda() as gpu:
        loss, gradient = step(name, GPU)
        assert [str(sync) for sync in gpu.syncs if sync.within("losses/")] == []
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-3, atol=1e-5)
