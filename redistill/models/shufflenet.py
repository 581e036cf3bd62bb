"""ShuffleNet V1 (three groups) and V2 (width 1) for 32 px images: a 1 x 1 stem, then 16, 8 and 4 px.

Zhang et al. 2018 (arXiv 1707.01083) and Ma et al. 2018 (arXiv 1807.11164) without the stem's stride and pooling, as the
distillation literature uses them. Parameter names are those of its published checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ShuffleNetV1", "ShuffleNetV2"]

STEM = 24


def pointwise(inside: int, outside: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 1, groups=groups, bias=False)


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class GroupedUnit(nn.Module):
    """V1: grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1. With stride 2 the input is pooled and appended."""

    def __init__(self, inside: int, outside: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = outside // 4
        # The 24 channels of the stem are too few to group.
        first_groups = 1 if inside == STEM else groups
        self.conv1 = pointwise(inside, middle, first_groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = pointwise(middle, outside, groups)
        self.bn3 = nn.BatchNorm2d(outside)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.shortcut is None:
            return F.relu(out + x)
        return F.relu(torch.cat([out, self.shortcut(x)], 1))


class ShuffleNetV1(nn.Module):
    def __init__(
        self,
        num_classes: int,
        *,
        widths: tuple[int, ...] = (240, 480, 960),
        blocks: tuple[int, ...] = (4, 8, 4),
        groups: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = pointwise(3, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        inside = (STEM, *widths)

        def stage(i: int) -> nn.Sequential:
            first = GroupedUnit(inside[i], widths[i] - inside[i], 2, groups)
            return nn.Sequential(first, *(GroupedUnit(widths[i], widths[i], 1, groups) for _ in range(blocks[i] - 1)))

        self.layer1, self.layer2, self.layer3 = (stage(i) for i in range(3))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class SplitUnit(nn.Module):
    """V2, stride 1: half of the channels pass by, half are filtered, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.passing = half = channels // 2
        self.conv1, self.bn1 = pointwise(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x[:, self.passing :])))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return self.shuffle(torch.cat([x[:, : self.passing], out], 1))  # type: ignore[no-any-return]


class DownUnit(nn.Module):
    """V2, stride 2: both branches see all channels; conv1-conv2 is the short one, conv3-conv5 the long one."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        half = outside // 2
        self.conv1, self.bn1 = depthwise(inside, 2), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = pointwise(inside, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = pointwise(inside, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        short = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        long = F.relu(self.bn5(self.conv5(long)))
        return self.shuffle(torch.cat([short, long], 1))  # type: ignore[no-any-return]


class ShuffleNetV2(nn.Module):
    def __init__(
        self,
        num_classes: int,
        *,
        widths: tuple[int, ...] = (116, 232, 464),
        blocks: tuple[int, ...] = (3, 7, 3),
        last: int = 1024,
    ) -> None:
        super().__init__()
        self.conv1 = pointwise(3, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        inside = (STEM, *widths)

        def stage(i: int) -> nn.Sequential:
            return nn.Sequential(DownUnit(inside[i], widths[i]), *(SplitUnit(widths[i]) for _ in range(blocks[i])))

        self.layer1, self.layer2, self.layer3 = (stage(i) for i in range(3))
        self.conv2 = pointwise(widths[-1], last)
        self.bn2 = nn.BatchNorm2d(last)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.avgpool(F.relu(self.bn2(self.conv2(x))))
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]
