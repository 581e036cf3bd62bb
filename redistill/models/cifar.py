"""`cifar:NAME`: the networks of the distillation literature for 32 px images, by the names it gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from redistill_cache.errors import UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.models.model_info import CIFAR10, CIFAR100, Blueprint, ModelInfo
from redistill.specs import Spec, did_you_mean

__all__ = [
    "DEPTHS",
    "NAMES",
    "VGG",
    "CifarResNet",
    "MobileNetV2",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideResNet",
    "WideStemResNet",
    "build",
    "cifar_blueprint",
    "cifar_resnet",
    "fan_out_init",
    "mobilenetv2",
    "vgg",
    "wide_resnet",
    "wide_stem_resnet",
]


# -- initial ----------------------------------------------------------------------------------------------------------
#
# Initial weights, shared by the networks of this package.


def fan_out_init(module: nn.Module, *, linear_std: float | None = None) -> None:
    """He initialisation by fan-out for convolutions, one and zero for norms: what the residual papers train from.

    Linear layers keep torch's default, or get N(0, linear_std²) with zero bias.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            # Depthwise convolutions count their full fan-out here, as the published networks do (groups ignored).
            fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
            nn.init.normal_(part.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear) and linear_std is not None:
            nn.init.normal_(part.weight, 0.0, linear_std)
            nn.init.zeros_(part.bias)


# -- cifar resnet -----------------------------------------------------------------------------------------------------
#
# Residual networks for 32 px images.
#
#     cifar_resnet(depth=20, widths=(16, 16, 32, 64))     resnet8 ... resnet110: three stages of (depth - 2) / 6 blocks
#     cifar_resnet(depth=8, widths=(32, 64, 128, 256))    resnet8x4, resnet32x4
#     wide_stem_resnet("bottleneck", (3, 4, 6, 3))        ResNet50: ImageNet's four stages behind a 3 x 3, stride 1 stem
#
# He et al. 2016 (arXiv 1512.03385), section 4.2. Parameter names are those of the checkpoints that the distillation
# literature publishes (CRD and its followers), so such files load without conversion.


def conv3x3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)


def projection(inside: int, outside: int, stride: int) -> nn.Sequential:
    """The shortcut where the shape changes; an empty Sequential, which passes its input on, where it does not."""
    if stride == 1 and inside == outside:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside))


class BasicBlock(nn.Module):
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


Block = type[BasicBlock] | type[Bottleneck]


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
        self.layer1 = stage(BasicBlock, stem, first, blocks, 1, "downsample")
        self.layer2 = stage(BasicBlock, first, second, blocks, 2, "downsample")
        self.layer3 = stage(BasicBlock, second, third, blocks, 2, "downsample")
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


# -- wide resnet ------------------------------------------------------------------------------------------------------
#
# Wide residual networks, wrn_DEPTH_WIDTH: pre-activation blocks, widths 16, 32, 64 times WIDTH.
#
# Zagoruyko & Komodakis 2016 (arXiv 1605.07146), without dropout, as the distillation literature trains them.
# Parameter names are those of its published checkpoints.


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


# -- vgg --------------------------------------------------------------------------------------------------------------
#
# VGG with batch normalisation for 32 px images: five blocks, one linear layer.
#
# Simonyan & Zisserman 2015 (arXiv 1409.1556), convolutions only. Images below 64 px skip the pooling between the
# last two blocks, so that 4 px are left at the end. Parameter names are those of the distillation literature's
# checkpoints.

# Convolutions in each of the five blocks.
DEPTHS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


def block(inside: int, width: int, convolutions: int) -> nn.Sequential:
    """conv, norm, ReLU, conv, norm, ...: the last ReLU is left to the caller."""
    layers: list[nn.Module] = []
    for c in [inside, *[width] * (convolutions - 1)]:
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    def __init__(self, convolutions: tuple[int, ...], num_classes: int, *, small_images: bool) -> None:
        super().__init__()
        shapes = zip((3, *WIDTHS[:-1]), WIDTHS, convolutions, strict=True)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (block(*shape) for shape in shapes)
        self.pool = nn.MaxPool2d(2)
        self.last_pool = nn.Identity() if small_images else nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        fan_out_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.block0(x)))
        x = self.pool(F.relu(self.block1(x)))
        x = self.pool(F.relu(self.block2(x)))
        x = self.last_pool(F.relu(self.block3(x)))
        x = self.avgpool(F.relu(self.block4(x)))
        return self.classifier(x.flatten(1))  # type: ignore[no-any-return]


def vgg(depth: int, num_classes: int, input_size: int | None = None) -> VGG:
    return VGG(DEPTHS[depth], num_classes, small_images=input_size is None or input_size < 64)


# -- mobilenetv2 ------------------------------------------------------------------------------------------------------
#
# MobileNetV2 at half width for 32 px images, as the distillation literature uses it (expansion 6, width 0.5).
#
# Sandler et al. 2018 (arXiv 1801.04381). The stem has stride 2 and the second stage keeps its resolution: 16, 16, 8,
# 4, 4, 2, 2 px. The shortcut is taken wherever the shapes allow it. Parameter names are those of published
# checkpoints.

# (expansion?, channels at full width, blocks, stride of the first block)
STAGES = ((False, 16, 1, 1), (True, 24, 2, 1), (True, 32, 3, 2), (True, 64, 4, 2), (True, 96, 3, 1), (True, 160, 3, 2),
          (True, 320, 1, 1))  # fmt: skip
MOBILENET_STEM, MOBILENET_LAST = 32, 1280


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
        inside = int(MOBILENET_STEM * width)
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
        last = int(MOBILENET_LAST * max(width, 1.0))
        self.conv2 = nn.Sequential(*conv_norm(inside, last, 1), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        fan_out_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def mobilenetv2(num_classes: int) -> MobileNetV2:
    return MobileNetV2(expansion=6, width=0.5, num_classes=num_classes)


# -- shufflenet -------------------------------------------------------------------------------------------------------
#
# ShuffleNet V1 (three groups) and V2 (width 1) for 32 px images: a 1 x 1 stem, then 16, 8 and 4 px.
#
# Zhang et al. 2018 (arXiv 1707.01083) and Ma et al. 2018 (arXiv 1807.11164) without the stem's stride and pooling,
# as the distillation literature uses them. Parameter names are those of its published checkpoints.

SHUFFLENET_STEM = 24


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
        first_groups = 1 if inside == SHUFFLENET_STEM else groups
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
        self.conv1 = pointwise(3, SHUFFLENET_STEM)
        self.bn1 = nn.BatchNorm2d(SHUFFLENET_STEM)
        inside = (SHUFFLENET_STEM, *widths)

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
        self.conv1 = pointwise(3, SHUFFLENET_STEM)
        self.bn1 = nn.BatchNorm2d(SHUFFLENET_STEM)
        inside = (SHUFFLENET_STEM, *widths)

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


# -- cifar ------------------------------------------------------------------------------------------------------------

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{d}": partial(cifar_resnet, d, NARROW) for d in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": partial(cifar_resnet, 8, WIDE),
    "resnet32x4": partial(cifar_resnet, 32, WIDE),
    "ResNet18": partial(wide_stem_resnet, BasicBlock, (2, 2, 2, 2)),
    "ResNet50": partial(wide_stem_resnet, Bottleneck, (3, 4, 6, 3)),
    **{f"wrn_{d}_{k}": partial(wide_resnet, d, k) for d in (16, 40) for k in (1, 2)},
    **{f"vgg{d}": partial(vgg, d) for d in DEPTHS},
    "MobileNetV2": mobilenetv2,
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
}
NAMES = tuple(BUILDERS)
CANONICAL = {name.lower(): name for name in NAMES}
WIDE_NAME = re.compile(r"wrn[_-](\d{1,3})[_-](\d{1,2})", re.IGNORECASE)


def canonical(name: str) -> str:
    """The name as the literature spells it. Case does not matter; any wrn_D_K is known."""
    if match := WIDE_NAME.fullmatch(name):
        return f"wrn_{int(match[1])}_{int(match[2])}"
    if name.lower() not in CANONICAL:
        raise UsageError(f"unknown network 'cifar:{name}'; {did_you_mean(name, [*NAMES, 'wrn_D_K'])}")
    return CANONICAL[name.lower()]


def build(name: str, num_classes: int, input_size: int | None = None) -> nn.Module:
    """A network with fresh weights."""
    name = canonical(name)
    if match := WIDE_NAME.fullmatch(name):
        return wide_resnet(int(match[1]), int(match[2]), num_classes)
    if name.startswith("vgg"):
        return vgg(int(name.removeprefix("vgg")), num_classes, input_size)
    return BUILDERS[name](num_classes)


def cifar_blueprint(spec: Spec) -> Blueprint:
    name = canonical(spec.name)

    def convention(num_classes: int) -> ModelInfo:
        """The protocol these networks are published with."""
        return ModelInfo(norm=CIFAR10 if num_classes == 10 else CIFAR100, input_size=32)

    def of_bare_file(num_classes: int) -> ModelInfo:
        # Published CIFAR-100 checkpoints share one normalisation; those of CIFAR-10 do not agree on theirs.
        return convention(num_classes) if num_classes == 100 else ModelInfo(input_size=32)

    return Blueprint(name=name, build=partial(build, name), fresh=convention, bare_file=of_bare_file)
