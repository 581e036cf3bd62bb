"""Residual networks for 32 px images.

    cifar_resnet(depth=20, widths=(16, 16, 32, 64))     resnet8 ... resnet110: three stages of (depth - 2) / 6 blocks
    cifar_resnet(depth=8, widths=(32, 64, 128, 256))    resnet8x4, resnet32x4
    wide_stem_resnet("bottleneck", (3, 4, 6, 3))        ResNet50: ImageNet's four stages behind a 3 x 3, stride 1 stem

He et al. 2016 (arXiv 1512.03385), section 4.2. Parameter names are those of the checkpoints that the distillation
literature publishes (CRD and its followers), so such files load without conversion.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from redistill.models.initial import fan_out_init

__all__ = ["CifarResNet", "WideStemResNet", "cifar_resnet", "wide_stem_resnet"]


def conv3x3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)


def projection(inside: int, outside: int, stride: int) -> nn.Sequential:
    """The shortcut where the shape changes; an empty Sequential, which passes its input on, where it does not."""
    if stride == 1 and inside == outside:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside))


class Basic(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which the checkpoints call `downsample` or `shortcut`."""

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, shortcut_name: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inside, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name = shortcut_name
        self.add_module(shortcut_name, projection(inside, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 with four times the width outside."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, shortcut_name: str) -> None:
        super().__init__()
        outside = width * self.expansion
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.shortcut_name = shortcut_name
        self.add_module(shortcut_name, projection(inside, outside, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


Block = type[Basic] | type[Bottleneck]


def stage(block: Block, inside: int, width: int, blocks: int, stride: int, shortcut_name: str) -> nn.Sequential:
    """`blocks` blocks, the first of which may change shape."""
    widths = [inside, *[width * block.expansion] * (blocks - 1)]
    strides = [stride, *[1] * (blocks - 1)]
    return nn.Sequential(*(block(c, width, s, shortcut_name) for c, s in zip(widths, strides, strict=True)))


class CifarResNet(nn.Module):
    """Three stages at 32, 16 and 8 px. `widths`: stem, then the stages."""

    def __init__(self, blocks: int, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = stage(Basic, stem, first, blocks, 1, "downsample")
        self.layer2 = stage(Basic, first, second, blocks, 2, "downsample")
        self.layer3 = stage(Basic, second, third, blocks, 2, "downsample")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        fan_out_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class WideStemResNet(nn.Module):
    """ImageNet's residual network with a stem that keeps the resolution: 32, 16, 8 and 4 px."""

    def __init__(self, block: Block, blocks: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        grow = block.expansion
        self.layer1 = stage(block, 64, 64, blocks[0], 1, "shortcut")
        self.layer2 = stage(block, 64 * grow, 128, blocks[1], 2, "shortcut")
        self.layer3 = stage(block, 128 * grow, 256, blocks[2], 2, "shortcut")
        self.layer4 = stage(block, 256 * grow, 512, blocks[3], 2, "shortcut")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512 * grow, num_classes)
        fan_out_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def cifar_resnet(depth: int, widths: Sequence[int], num_classes: int) -> CifarResNet:
    assert (depth - 2) % 6 == 0, depth
    return CifarResNet((depth - 2) // 6, widths, num_classes)


def wide_stem_resnet(block: Block, blocks: Sequence[int], num_classes: int) -> WideStemResNet:
    return WideStemResNet(block, blocks, num_classes)
