"""What must be known of a model besides its weights, and where each piece of it comes from.

Facts are collected from several places, each of which may leave gaps, and laid over each other: options of the spec,
then the header of the weights file, then what its publisher declares. What is still missing is asked for, never
guessed: a teacher with the wrong normalisation speaks nonsense quietly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from redistill_cache.errors import Refused, UsageError

from redistill.specs import Spec, did_you_mean

__all__ = ["CIFAR10", "CIFAR100", "HALF", "IMAGENET", "NORMS", "OPTIONS", "Facts", "Norm"]

Triple = tuple[float, float, float]


class Norm(NamedTuple):
    """Channel mean and standard deviation of pixels in 0..1."""

    mean: Triple
    std: Triple


IMAGENET = Norm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR100 = Norm((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
CIFAR10 = Norm((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
HALF = Norm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMS = {"imagenet": IMAGENET, "cifar100": CIFAR100, "cifar10": CIFAR10, "half": HALF}

OPTIONS = frozenset({"num_classes", "size", "mean", "std", "norm", "weights", "seed"})

MAX_CLASSES, MAX_SIZE = 1 << 20, 1 << 14


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Each field may be unknown."""

    num_classes: int | None = None
    input_size: int | None = None
    """Side of the square the network expects, in pixels."""
    norm: Norm | None = None
    interpolation: str | None = None
    """How its authors resize for evaluation: a hint for recipes."""
    resize: int | None = None
    """The shorter side before their centre crop: a hint for recipes."""

    def over(self, other: Facts) -> Facts:
        """These facts, their gaps filled from `other`."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Facts(**{name: low if high is None else high for name, (high, low) in pairs.items()})

    def to_json(self) -> dict[str, Any]:
        known = {name: value for name, value in asdict(self).items() if value is not None and name != "norm"}
        if self.norm is not None:
            known |= {"mean": list(self.norm.mean), "std": list(self.norm.std)}
        return known

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str) -> Facts:
        """Strict: the header of a weights file may come from anybody. Unknown keys are left to newer readers."""
        mean, std = found.get("mean"), found.get("std")
        if (mean is None) != (std is None):
            raise Refused(f"{where}: mean and std must come together, found only one of them")
        try:
            return cls(
                num_classes=whole(found.get("num_classes"), MAX_CLASSES),
                input_size=whole(found.get("input_size"), MAX_SIZE),
                norm=None if mean is None or std is None else Norm(triple(mean), triple(std, positive=True)),
                interpolation=word(found.get("interpolation")),
                resize=whole(found.get("resize"), MAX_SIZE),
            )
        except ValueError as error:
            raise Refused(f"{where}: {error}") from None

    @classmethod
    def from_options(cls, spec: Spec) -> Facts:
        """num_classes=, size=, norm= or mean= and std= of a spec string."""
        try:
            return cls(
                num_classes=whole(number(spec.options.get("num_classes")), MAX_CLASSES),
                input_size=whole(number(spec.options.get("size")), MAX_SIZE),
                norm=norm_option(spec),
            )
        except ValueError as error:
            raise UsageError(f"{spec.text!r}: {error}") from None


def whole(value: object, high: int) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise ValueError(f"expected a whole number from 1 to {high}, found {value!r}")
    return value


def number(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"expected a whole number, found {text!r}")
    return int(text)


def word(value: object) -> str | None:
    if value is not None and value not in ("nearest", "bilinear", "bicubic", "lanczos", "random"):
        raise ValueError(f"expected the name of an interpolation, found {value!r:.40}")
    return None if value is None else str(value)


def triple(value: object, *, positive: bool = False) -> Triple:
    """Three finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"expected three numbers, found {value!r:.60}")
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in value):
        raise ValueError(f"expected three finite numbers, found {value!r:.60}")
    if positive and min(value) <= 0:
        raise ValueError(f"expected standard deviations above 0, found {value!r:.60}")
    return float(value[0]), float(value[1]), float(value[2])


def norm_option(spec: Spec) -> Norm | None:
    name, mean, std = (spec.options.get(key) for key in ("norm", "mean", "std"))
    if name is not None:
        if mean is not None or std is not None:
            raise ValueError("give norm=NAME, or mean= and std=, not both")
        if name not in NORMS:
            raise ValueError(f"unknown norm={name!r}; {did_you_mean(name, NORMS)}")
        return NORMS[name]
    if (mean is None) != (std is None):
        raise ValueError(f"mean= and std= go together, found only {'mean=' if std is None else 'std='}")
    if mean is None or std is None:
        return None
    return Norm(triple(split(mean)), triple(split(std), positive=True))


def split(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected three numbers as in 0.5,0.5,0.5, found {text!r}") from None
