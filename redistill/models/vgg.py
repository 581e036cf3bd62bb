"""VGG with batch normalisation for 32 px images: five blocks, one linear layer.

Simonyan & Zisserman 2015 (arXiv 1409.1556), convolutions only. Images below 64 px skip the pooling between the last
two blocks, so that 4 px are left at the end. Parameter names are those of the distillation literature's checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from redistill.models.initial import fan_out_init

__all__ = ["DEPTHS", "VGG", "vgg"]

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
