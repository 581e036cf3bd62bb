"""Wide residual networks, wrn_DEPTH_WIDTH: pre-activation blocks, widths 16, 32, 64 times WIDTH.

Zagoruyko & Komodakis 2016 (arXiv 1605.07146), without dropout, as the distillation literature trains them. Parameter
names are those of its published checkpoints.
"""

from __future__ import annotations

from redistill_cache.errors import UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.models.initial import fan_out_init

__all__ = ["WideResNet", "wide_resnet"]


class PreActivation(nn.Module):
    """norm, ReLU, conv, twice. Where the width changes, the shortcut also starts from the activated input."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        # This spelling is that of the checkpoints.
        self.convShortcut = None if inside == outside else nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """A run of blocks under the name `layer`."""

    def __init__(self, inside: int, outside: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = [PreActivation(outside, outside, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreActivation(inside, outside, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    def __init__(self, blocks: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, 16 * width, blocks, 1)
        self.block2 = Stage(16 * width, 32 * width, blocks, 2)
        self.block3 = Stage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        fan_out_init(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.avgpool(F.relu(self.bn1(x)))
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


def wide_resnet(depth: int, width: int, num_classes: int) -> WideResNet:
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise UsageError(f"wrn_{depth}_{width}: expected wrn_D_K with D = 6n + 4 (10, 16, 22, 28, 40, ...) and K >= 1")
    return WideResNet((depth - 4) // 6, width, num_classes)
