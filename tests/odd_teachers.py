"""Unusual teachers, most of which stage 1 must refuse: `--teacher python:tests.odd_teachers:NanLogits?...`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from redistill.models import open_model

CLASSES = 5


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = open_model(f"demo:tiny?num_classes={CLASSES}&weights=random").module

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class FixedSize(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 32, f"wrong image size {x.shape[-1]}, expected 32"
        return self.inner(x)


class NanLogits(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * float("nan")


class RarelyNan(Wrapped):
    """NaN for about one view in 400, depending on its pixels."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        grey = (x * 63.75).round().long().flatten(1)
        odd = (grey * torch.arange(grey.shape[1])).sum(1) % 401 == 7
        return torch.where(odd[:, None], logits * float("nan"), logits)


class NanAfter700Images(Wrapped):
    """NaN after every check has passed, but before the end of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.inner(x) * (float("nan") if self.seen > 700 else 1.0)


class AlwaysTraining(Wrapped):
    def train(self, mode: bool = True) -> nn.Module:  # noqa: ARG002  ignoring it is the defect
        return super().train(True)


class CountsCalls(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class OutOfMemory(Wrapped):
    """Fails to allocate memory for more than four images."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            torch.empty(1 << 55)
        return self.inner(x)


class NotDeterministic(Wrapped):
    """Different logits at every call, without any change of parameters or buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.offset += 1.0
        return self.inner(x) + torch.arange(CLASSES) * self.offset


class BatchDependent(Wrapped):
    """Normalises with the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0))


class ManyClasses(nn.Module):
    """120 classes from 24 features, as in face recognition: a valid teacher whose head is a good basis."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(24, 120)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class Branching(Wrapped):
    """Cannot be traced: which path is taken depends on the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean() > -100 else self.inner(-x)


class NoBlocks(nn.Module):
    """Without lists of modules, and without a final linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class NanFeatures(Wrapped):
    """NaN inside, and finite logits."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Sequential(LogOfNegative())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0 * torch.nan_to_num(self.odd(x)).mean((1, 2, 3))[:, None]


class LogOfNegative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-1 - self.relu(x))
