"""MobileNetV2 at half width for 32 px images, as the distillation literature uses it (expansion 6, width 0.5).

Sandler et al. 2018 (arXiv 1801.04381). The stem has stride 2 and the second stage keeps its resolution: 16, 16, 8, 4,
4, 2, 2 px. The shortcut is taken wherever the shapes allow it. Parameter names are those of published checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn

from redistill.models.initial import fan_out_init

__all__ = ["MobileNetV2", "mobilenetv2"]

# (expansion?, channels at full width, blocks, stride of the first block)
STAGES = ((False, 16, 1, 1), (True, 24, 2, 1), (True, 32, 3, 2), (True, 64, 4, 2), (True, 96, 3, 1), (True, 160, 3, 2),
          (True, 320, 1, 1))  # fmt: skip
STEM, LAST = 32, 1280


def conv_norm(inside: int, outside: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inside, outside, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outside)]


class InvertedResidual(nn.Module):
    """Widen, filter depthwise, narrow without an activation."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.conv = nn.Sequential(
            *conv_norm(inside, wide, 1),
            nn.ReLU(inplace=True),
            *conv_norm(wide, wide, 3, stride=stride, groups=wide),
            nn.ReLU(inplace=True),
            *conv_norm(wide, outside, 1),
        )
        self.adds_input = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.adds_input else out


class MobileNetV2(nn.Module):
    def __init__(self, expansion: int, width: float, num_classes: int) -> None:
        super().__init__()
        inside = int(STEM * width)
        self.conv1 = nn.Sequential(*conv_norm(3, inside, 3, stride=2), nn.ReLU(inplace=True))
        stages = []
        for expands, channels, blocks, stride in STAGES:
            outside = int(channels * width)
            factor = expansion if expands else 1
            first = InvertedResidual(inside, outside, stride, factor)
            stages.append(
                nn.Sequential(first, *(InvertedResidual(outside, outside, 1, factor) for _ in range(blocks - 1)))
            )
            inside = outside
        self.blocks = nn.Sequential(*stages)
        last = int(LAST * max(width, 1.0))
        self.conv2 = nn.Sequential(*conv_norm(inside, last, 1), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        fan_out_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def mobilenetv2(num_classes: int) -> MobileNetV2:
    return MobileNetV2(expansion=6, width=0.5, num_classes=num_classes)
