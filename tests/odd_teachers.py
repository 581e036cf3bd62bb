"""Teachers that should not be written down, as a user's own module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from redistill.models import open_model

CLASSES = 5


def network() -> nn.Module:
    return open_model(f"demo:tiny?num_classes={CLASSES}&weights=random").module


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class FixedSize(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 32, f"wrong image size {x.shape[-1]}, expected 32"
        return self.inner(x)


class Nan(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * float("nan")


class RarelyNan(Wrapped):
    """NaN for about one view in four hundred, decided by its pixels."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        grey = (x * 63.75).round().long().flatten(1)
        odd = (grey * torch.arange(grey.shape[1])).sum(1) % 401 == 7
        return torch.where(odd[:, None], logits * float("nan"), logits)


class AlwaysTraining(Wrapped):
    def train(self, mode: bool = True) -> nn.Module:  # noqa: ARG002  the point of it
        return super().train(True)


class CountsCalls(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


fixed_size, says_nan, rarely_nan, always_training, counts_calls = FixedSize, Nan, RarelyNan, AlwaysTraining, CountsCalls


class Greedy(Wrapped):
    """Runs out of memory with more than four images."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            torch.empty(1 << 55)
        return self.inner(x)


class Moody(Wrapped):
    """Another answer every time, and no trace of it in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.mood = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mood += 1.0
        return self.inner(x) + torch.arange(CLASSES) * self.mood


class Gregarious(Wrapped):
    """Normalises by the images beside one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0))


class Tired(Wrapped):
    """NaN from its 700th image on: after every check, before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.inner(x) * (float("nan") if self.seen > 700 else 1.0)


class Wide(nn.Module):
    """Many classes from few features, as with face recognition."""

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


greedy, moody, gregarious, tired, wide = Greedy, Moody, Gregarious, Tired, Wide
