"""`cifar:NAME`: the networks of the distillation literature for 32 px images, by the names it gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from redistill_cache.errors import UsageError
from torch import nn

from redistill.models.blueprint import Blueprint
from redistill.models.cifar_resnet import Basic, Bottleneck, cifar_resnet, wide_stem_resnet
from redistill.models.facts import CIFAR10, CIFAR100, Facts
from redistill.models.mobilenetv2 import mobilenetv2
from redistill.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from redistill.models.vgg import DEPTHS, vgg
from redistill.models.wide_resnet import wide_resnet
from redistill.specs import Spec, did_you_mean

__all__ = ["NAMES", "blueprint", "build"]

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{d}": partial(cifar_resnet, d, NARROW) for d in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": partial(cifar_resnet, 8, WIDE),
    "resnet32x4": partial(cifar_resnet, 32, WIDE),
    "ResNet18": partial(wide_stem_resnet, Basic, (2, 2, 2, 2)),
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


def blueprint(spec: Spec) -> Blueprint:
    name = canonical(spec.name)

    def convention(num_classes: int) -> Facts:
        """The protocol these networks are published with."""
        return Facts(norm=CIFAR10 if num_classes == 10 else CIFAR100, input_size=32)

    def of_bare_file(num_classes: int) -> Facts:
        # Published CIFAR-100 checkpoints share one normalisation; those of CIFAR-10 do not agree on theirs.
        return convention(num_classes) if num_classes == 100 else Facts(input_size=32)

    return Blueprint(name=name, build=partial(build, name), fresh=convention, bare_file=of_bare_file)
