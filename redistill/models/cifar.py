"""`cifar:NAME`: the networks of the knowledge distillation literature for 32 px images.

The tables of that literature use these networks under these names. They differ in detail from torchvision's and timm's
networks of the same papers, and are included so that the tables can be reproduced. Parameter names are those of the
checkpoints published by CRD and its followers, which load without conversion.

    resnet8 ... resnet110, resnet8x4, resnet32x4    three stages        He et al. 2016 (arXiv 1512.03385), section 4.2
    ResNet18, ResNet50                              ImageNet's four stages behind a 3 x 3 stem with stride 1
    wrn_D_K                                         pre-activation      Zagoruyko & Komodakis 2016 (arXiv 1605.07146)
    vgg8 ... vgg19                                  batch norm          Simonyan & Zisserman 2015 (arXiv 1409.1556)
    MobileNetV2                                     half width          Sandler et al. 2018 (arXiv 1801.04381)
    ShuffleV1, ShuffleV2                            3 groups, width 1   Zhang et al. 2018 (arXiv 1707.01083),
                                                                        Ma et al. 2018 (arXiv 1807.11164)
"""

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

__all__ = ["NAMES", "build", "canonical", "cifar_blueprint", "fan_out_init"]


def fan_out_init(module: nn.Module, *, linear_std: float | None = None) -> None:
    """He initialisation by fan-out for convolutions, one and zero for norms, as in the papers of residual networks.

    Linear layers keep torch's default, or get N(0, linear_std²) with zero bias.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            # The groups of depthwise convolutions are ignored, as in the published networks.
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


# -- residual networks ------------------------------------------------------------------------------------------------


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The shortcut: a projection if the shape changes, else an empty Sequential (the identity)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, named `downsample` or `shortcut` as in the checkpoints."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut_name: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name = shortcut_name
        self.add_module(shortcut_name, projection(in_channels, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, with four times the width at input and output, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut_name: str) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut_name = shortcut_name
        self.add_module(shortcut_name, projection(in_channels, out_channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


Block = type[BasicBlock] | type[Bottleneck]


def residual_stage(
    block: Block, in_channels: int, width: int, blocks: int, stride: int, shortcut_name: str
) -> nn.Sequential:
    """`blocks` blocks, the first of which may change the shape."""
    widths = [in_channels, *[width * block.expansion] * (blocks - 1)]
    strides = [stride, *[1] * (blocks - 1)]
    return nn.Sequential(*(block(c, width, s, shortcut_name) for c, s in zip(widths, strides, strict=True)))


class CifarResNet(nn.Module):
    """Three stages of (depth - 2) / 6 blocks, at 32, 16 and 8 px. `widths`: stem, then the stages."""

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0, depth
        blocks = (depth - 2) // 6
        stem, first, second, third = widths
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = residual_stage(BasicBlock, stem, first, blocks, 1, "downsample")
        self.layer2 = residual_stage(BasicBlock, first, second, blocks, 2, "downsample")
        self.layer3 = residual_stage(BasicBlock, second, third, blocks, 2, "downsample")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        fan_out_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class WideStemResNet(nn.Module):
    """ImageNet's residual network with a stem that keeps the resolution: four stages at 32, 16, 8 and 4 px."""

    def __init__(self, block: Block, blocks: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        grow = block.expansion
        self.layer1 = residual_stage(block, 64, 64, blocks[0], 1, "shortcut")
        self.layer2 = residual_stage(block, 64 * grow, 128, blocks[1], 2, "shortcut")
        self.layer3 = residual_stage(block, 128 * grow, 256, blocks[2], 2, "shortcut")
        self.layer4 = residual_stage(block, 256 * grow, 512, blocks[3], 2, "shortcut")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512 * grow, num_classes)
        fan_out_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


# -- wide residual networks -------------------------------------------------------------------------------------------


class PreActivation(nn.Module):
    """Twice norm, ReLU, conv. If the width changes, the shortcut starts from the activated input as well."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        # Spelled as in the checkpoints.
        self.convShortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))  # type: ignore[no-any-return]


class WideStage(nn.Module):
    """A sequence of blocks, named `layer` as in the checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = [PreActivation(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreActivation(in_channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """wrn_DEPTH_WIDTH: widths 16, 32 and 64 times `width`, without dropout."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UsageError(
                f"wrn_{depth}_{width}: expected wrn_D_K with D = 6n + 4 (10, 16, 22, 28, 40, ...) and K >= 1"
            )
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, 16 * width, blocks, 1)
        self.block2 = WideStage(16 * width, 32 * width, blocks, 2)
        self.block3 = WideStage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        fan_out_init(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.avgpool(F.relu(self.bn1(x)))
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


# -- VGG --------------------------------------------------------------------------------------------------------------

# Depth -> convolutions in each of the five blocks.
VGG_BLOCKS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
VGG_WIDTHS = (64, 128, 256, 512, 512)


def vgg_block(in_channels: int, width: int, convolutions: int) -> nn.Sequential:
    """conv, norm, ReLU, conv, norm, ... without the last ReLU."""
    layers: list[nn.Module] = []
    for c in [in_channels, *[width] * (convolutions - 1)]:
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """Five blocks and one linear layer. Below 64 px there is no pooling before the last block."""

    def __init__(self, depth: int, num_classes: int, input_size: int | None = None) -> None:
        super().__init__()
        shapes = zip((3, *VGG_WIDTHS[:-1]), VGG_WIDTHS, VGG_BLOCKS[depth], strict=True)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (vgg_block(*shape) for shape in shapes)
        self.pool = nn.MaxPool2d(2)
        small_images = input_size is None or input_size < 64
        self.last_pool = nn.Identity() if small_images else nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(VGG_WIDTHS[-1], num_classes)
        fan_out_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.block0(x)))
        x = self.pool(F.relu(self.block1(x)))
        x = self.pool(F.relu(self.block2(x)))
        x = self.last_pool(F.relu(self.block3(x)))
        x = self.avgpool(F.relu(self.block4(x)))
        return self.classifier(x.flatten(1))  # type: ignore[no-any-return]


# -- MobileNet --------------------------------------------------------------------------------------------------------

# (expansion?, channels at full width, blocks, stride of the first block)
MOBILENET_STAGES = (
    (False, 16, 1, 1),
    (True, 24, 2, 1),
    (True, 32, 3, 2),
    (True, 64, 4, 2),
    (True, 96, 3, 1),
    (True, 160, 3, 2),
    (True, 320, 1, 1),
)
MOBILENET_STEM, MOBILENET_LAST = 32, 1280
MOBILENET_WIDTH, MOBILENET_EXPANSION = 0.5, 6


def conv_norm(in_channels: int, out_channels: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """Widen, filter depthwise, narrow without an activation; a shortcut wherever the shapes are equal."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.conv = nn.Sequential(
            *conv_norm(in_channels, wide, 1),
            nn.ReLU(inplace=True),
            *conv_norm(wide, wide, 3, stride=stride, groups=wide),
            nn.ReLU(inplace=True),
            *conv_norm(wide, out_channels, 1),
        )
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.adds_input else out


class MobileNetV2(nn.Module):
    """Half width. The stem has stride 2 and the second stage keeps its resolution: 16, 16, 8, 4, 4, 2 and 2 px."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        in_channels = int(MOBILENET_STEM * MOBILENET_WIDTH)
        self.conv1 = nn.Sequential(*conv_norm(3, in_channels, 3, stride=2), nn.ReLU(inplace=True))
        stages = []
        for expands, channels, blocks, stride in MOBILENET_STAGES:
            out_channels = int(channels * MOBILENET_WIDTH)
            factor = MOBILENET_EXPANSION if expands else 1
            first = InvertedResidual(in_channels, out_channels, stride, factor)
            rest = [InvertedResidual(out_channels, out_channels, 1, factor) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            in_channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(*conv_norm(in_channels, MOBILENET_LAST, 1), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(MOBILENET_LAST, num_classes))
        fan_out_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


# -- ShuffleNet -------------------------------------------------------------------------------------------------------

SHUFFLENET_STEM = 24
SHUFFLENET_V1_GROUPS = 3
SHUFFLENET_V2_LAST = 1024


def pointwise(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class GroupedUnit(nn.Module):
    """V1: grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1. With stride 2 the pooled input is appended."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        middle = out_channels // 4
        # The 24 channels of the stem are too few to group.
        first_groups = 1 if in_channels == SHUFFLENET_STEM else SHUFFLENET_V1_GROUPS
        self.conv1 = pointwise(in_channels, middle, first_groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = pointwise(middle, out_channels, SHUFFLENET_V1_GROUPS)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.shortcut is None:
            return F.relu(out + x)
        return F.relu(torch.cat([out, self.shortcut(x)], 1))


def grouped_stage(in_channels: int, width: int, units: int) -> nn.Sequential:
    """The first unit halves the resolution and appends its input, so its own output has the missing channels."""
    first = GroupedUnit(in_channels, width - in_channels, 2)
    return nn.Sequential(first, *(GroupedUnit(width, width, 1) for _ in range(units - 1)))


class ShuffleNetV1(nn.Module):
    """Three groups. A 1 x 1 stem without stride and pooling, then 16, 8 and 4 px."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = pointwise(3, SHUFFLENET_STEM)
        self.bn1 = nn.BatchNorm2d(SHUFFLENET_STEM)
        self.layer1 = grouped_stage(SHUFFLENET_STEM, 240, 4)
        self.layer2 = grouped_stage(240, 480, 8)
        self.layer3 = grouped_stage(480, 960, 4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class SplitUnit(nn.Module):
    """V2, stride 1: half of the channels are filtered, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split_at = half = channels // 2
        self.conv1, self.bn1 = pointwise(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x[:, self.split_at :])))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return self.shuffle(torch.cat([x[:, : self.split_at], out], 1))  # type: ignore[no-any-return]


class DownUnit(nn.Module):
    """V2, stride 2: two branches over all channels, the short one conv1-conv2 and the long one conv3-conv5."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = depthwise(in_channels, 2), nn.BatchNorm2d(in_channels)
        self.conv2, self.bn2 = pointwise(in_channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = pointwise(in_channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        short = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        long = F.relu(self.bn5(self.conv5(long)))
        return self.shuffle(torch.cat([short, long], 1))  # type: ignore[no-any-return]


def split_stage(in_channels: int, width: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, width), *(SplitUnit(width) for _ in range(units - 1)))


class ShuffleNetV2(nn.Module):
    """Width 1. A 1 x 1 stem without stride and pooling, then 16, 8 and 4 px."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = pointwise(3, SHUFFLENET_STEM)
        self.bn1 = nn.BatchNorm2d(SHUFFLENET_STEM)
        self.layer1 = split_stage(SHUFFLENET_STEM, 116, 4)
        self.layer2 = split_stage(116, 232, 8)
        self.layer3 = split_stage(232, 464, 4)
        self.conv2 = pointwise(464, SHUFFLENET_V2_LAST)
        self.bn2 = nn.BatchNorm2d(SHUFFLENET_V2_LAST)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(SHUFFLENET_V2_LAST, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.avgpool(F.relu(self.bn2(self.conv2(x))))
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]


# -- names ------------------------------------------------------------------------------------------------------------

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{d}": partial(CifarResNet, d, NARROW) for d in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": partial(CifarResNet, 8, WIDE),
    "resnet32x4": partial(CifarResNet, 32, WIDE),
    "ResNet18": partial(WideStemResNet, BasicBlock, (2, 2, 2, 2)),
    "ResNet50": partial(WideStemResNet, Bottleneck, (3, 4, 6, 3)),
    **{f"wrn_{d}_{k}": partial(WideResNet, d, k) for d in (16, 40) for k in (1, 2)},
    **{f"vgg{d}": partial(VGG, d) for d in VGG_BLOCKS},
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
}
NAMES = tuple(BUILDERS)
CANONICAL = {name.lower(): name for name in NAMES}
WIDE_NAME = re.compile(r"wrn[_-](\d{1,3})[_-](\d{1,2})", re.IGNORECASE)


def canonical(name: str) -> str:
    """The name in the spelling of the literature. Case is ignored; any wrn_D_K is accepted."""
    if match := WIDE_NAME.fullmatch(name):
        return f"wrn_{int(match[1])}_{int(match[2])}"
    if name.lower() not in CANONICAL:
        raise UsageError(f"unknown network 'cifar:{name}'; {did_you_mean(name, [*NAMES, 'wrn_D_K'])}")
    return CANONICAL[name.lower()]


def build(name: str, num_classes: int, input_size: int | None = None) -> nn.Module:
    """A network with fresh weights."""
    name = canonical(name)
    if match := WIDE_NAME.fullmatch(name):
        return WideResNet(int(match[1]), int(match[2]), num_classes)
    if name.startswith("vgg"):
        return VGG(int(name.removeprefix("vgg")), num_classes, input_size)
    return BUILDERS[name](num_classes)


def cifar_blueprint(spec: Spec) -> Blueprint:
    name = canonical(spec.name)

    def fresh_info(num_classes: int) -> ModelInfo:
        return ModelInfo(norm=CIFAR10 if num_classes == 10 else CIFAR100, input_size=32)

    def file_info(num_classes: int) -> ModelInfo:
        # All published CIFAR-100 checkpoints have this normalisation; those of CIFAR-10 differ.
        return fresh_info(num_classes) if num_classes == 100 else ModelInfo(input_size=32)

    return Blueprint(name=name, build=partial(build, name), fresh_info=fresh_info, file_info=file_info)
