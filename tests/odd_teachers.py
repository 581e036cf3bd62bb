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
