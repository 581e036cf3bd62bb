"""Every loss of the catalogue on a GPU, a simulated one, under autocast: the values of the CPU, and no host sync."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from redistill.losses import CATALOGUE, Objective
from redistill.losses.curriculum import TrainingProgress
from redistill.losses.objective import Pair, Widths, with_pairs
from redistill.signals import LOGITS
from tests.simulated_cuda import simulated_cuda

GPU = torch.device("cuda", 0)


LAYER = "penultimate"


def step(
    name: str, device: torch.device, fitted: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of the student's logits and features."""
    entry, generator = CATALOGUE[name], torch.Generator().manual_seed(0)
    student = (3 * torch.randn(12, 10 + 8, generator=generator)).to(device).requires_grad_()
    teacher = (5 * torch.randn(12, 10 + 6, generator=generator)).to(device)
    labels = torch.randint(0, 10, (12,), generator=generator).to(device)
    spec, widths = f"{name}?weight=1", None
    if entry.on_features:
        pair = Pair(*(LAYER if f"{side}_features" in entry.inputs else None for side in ("student", "teacher")))
        spec, widths = with_pairs(spec, entry, [pair]), Widths({LAYER: 8}, {LAYER: 6}, 10)
    torch.manual_seed(0)
    objective = Objective([spec, "ce?weight=0.5"], widths).to(device)
    objective.fit(lambda _: (teacher[:, 10:], labels))
    fitted()
    student_rows, teacher_rows = ({LOGITS: rows[:, :10], LAYER: rows[:, 10:]} for rows in (student * 1, teacher))
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = objective(student_rows, teacher_rows, labels, progress=TrainingProgress(1.5, 10.0))
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_a_loss_on_a_gpu(name: str):
    expected, expected_gradient = step(name, torch.device("cpu"))
    with simulated_cuda() as gpu:
        loss, gradient = step(name, GPU, fitted=gpu.syncs.clear)
        assert [str(sync) for sync in gpu.syncs if sync.within("losses/")] == []
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-3, atol=1e-5)
