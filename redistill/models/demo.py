"""`demo:NAME`: small networks for 32 px images that train in seconds on one CPU core.

tiny and small are students of plain convolutions; large is a residual teacher at about seven times the cost of small.
"""

from __future__ import annotations

from functools import partial

from redistill_cache.errors import UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.models.cifar import fan_out_init
from redistill.models.model_info import Blueprint, ModelInfo, Norm
from redistill.specs import Spec, did_you_mean

__all__ = ["NAMES", "DemoNet", "build", "demo_blueprint"]

# Widths of the stages at 16, 8 and 4 px.
WIDTHS = {"tiny": (8, 16, 32), "small": (16, 32, 64), "large": (32, 64, 128)}
RESIDUAL_BLOCKS = {"tiny": 0, "small": 0, "large": 1}
NAMES = tuple(WIDTHS)
NORM = Norm((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Residual(nn.Module):
    """Two 3 x 3 convolutions and an identity shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(out)))


def stage(in_channels: int, width: int, residual_blocks: int) -> nn.Sequential:
    """Halve the resolution, then the residual blocks, if any."""
    down = [
        nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*down, *(Residual(width) for _ in range(residual_blocks)))


class DemoNet(nn.Module):
    def __init__(self, widths: tuple[int, int, int], residual_blocks: int, num_classes: int) -> None:
        super().__init__()
        first, second, third = widths
        self.layer1 = stage(3, first, residual_blocks)
        self.layer2 = stage(first, second, residual_blocks)
        self.layer3 = stage(second, third, residual_blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        fan_out_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]  # nn.Module calls are untyped


def build(name: str, num_classes: int, input_size: int | None = None) -> nn.Module:
    del input_size  # the network accepts any size
    return DemoNet(WIDTHS[name], RESIDUAL_BLOCKS[name], num_classes)


def demo_blueprint(spec: Spec) -> Blueprint:
    if spec.name not in NAMES:
        raise UsageError(f"unknown network 'demo:{spec.name}'; {did_you_mean(spec.name, NAMES)}")

    def info(num_classes: int) -> ModelInfo:
        del num_classes
        return ModelInfo(norm=NORM, input_size=32)

    return Blueprint(name=spec.name, build=partial(build, spec.name), fresh_info=info, file_info=info)
