"""What must be known of a model besides its weights, and where each piece of it comes from.

Facts are collected from several places, each of which may leave gaps, and laid over each other: options of the spec,
then the header of the weights file, then what its publisher declares. What is still missing is asked for, never
guessed: a teacher with the wrong normalisation speaks nonsense quietly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn

from redistill.specs import Spec, did_you_mean

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "HALF",
    "IMAGENET",
    "NORMS",
    "OPTIONS",
    "Blueprint",
    "ModelInfo",
    "Norm",
    "Normalise",
    "OpenedModel",
    "Published",
]

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
class ModelInfo:
    """Each field may be unknown."""

    num_classes: int | None = None
    input_size: int | None = None
    """Side of the square the network expects, in pixels."""
    norm: Norm | None = None
    interpolation: str | None = None
    """How its authors resize for evaluation: a hint for recipes."""
    resize: int | None = None
    """The shorter side before their centre crop: a hint for recipes."""

    def over(self, other: ModelInfo) -> ModelInfo:
        """These facts, their gaps filled from `other`."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return ModelInfo(**{name: low if high is None else high for name, (high, low) in pairs.items()})

    def to_json(self) -> dict[str, Any]:
        known = {name: value for name, value in asdict(self).items() if value is not None and name != "norm"}
        if self.norm is not None:
            known |= {"mean": list(self.norm.mean), "std": list(self.norm.std)}
        return known

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str) -> ModelInfo:
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
    def from_options(cls, spec: Spec) -> ModelInfo:
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


# -- blueprint --------------------------------------------------------------------------------------------------------
#
# What each family of models (torchvision, timm, cifar, ...) has to say of one of its members.


@dataclass(frozen=True)
class Published:
    """Weights that a library offers under a name."""

    state: Mapping[str, Tensor]
    facts: ModelInfo
    source: str


def nothing_known(num_classes: int) -> ModelInfo:
    del num_classes
    return ModelInfo()


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """How to make a model, and what is known of it in each case."""

    name: str
    build: Callable[[int, int | None], nn.Module]
    """(num_classes, input_size) -> the network with fresh weights."""
    published: Callable[[str], Published] | None = None
    """weights=NAME -> what the library publishes under it; None: nothing is published."""
    published_names: tuple[str, ...] = ()
    fresh: Callable[[int], ModelInfo] = nothing_known
    """num_classes -> the convention for a network that starts from fresh weights."""
    bare_file: Callable[[int], ModelInfo] = nothing_known
    """num_classes -> what is known of weights from a file that says nothing about itself."""
    carries_weights: bool = False
    """The network comes with weights of its own (python: callables load theirs themselves)."""


# -- opened -----------------------------------------------------------------------------------------------------------
#
# A model and what must be known to use it.


@dataclass(frozen=True)
class OpenedModel:
    """A network on the CPU in float32, and the facts its user needs. Made by `open_model`."""

    module: nn.Module
    spec: str
    """As given, paths included; `portable_spec` is the one to write down."""
    name: str
    num_classes: int
    input_size: int | None
    """Side of the square input in pixels; None where neither the network nor its weights decide it."""
    mean: Triple
    std: Triple
    weights_digest: str | None
    """`state_digest` of the loaded state; None for fresh weights nobody asked for."""
    weights_source: str | None
    """"file", "random" (asked for), a library's own label, "python", or None: a student before training."""
    interpolation: str | None = None
    resize: int | None = None
    portable_spec: str = ""
    """The spec without paths: it opens the same architecture anywhere."""

    @property
    def facts(self) -> ModelInfo:
        return ModelInfo(
            num_classes=self.num_classes,
            input_size=self.input_size,
            norm=Norm(self.mean, self.std),
            interpolation=self.interpolation,
            resize=self.resize,
        )

    def metadata(self) -> dict[str, Any]:
        """For `save_weights`: a file with this header opens without further options."""
        return {"spec": self.portable_spec, **self.facts.to_json()}

    def describe(self) -> dict[str, Any]:
        """For an archive: what decides the model's answers, and nothing of this machine."""
        return {
            "name": self.name,
            "weights_digest": self.weights_digest,
            "weights_source": self.weights_source,
            **self.metadata(),
        }

    def normalise(self) -> Normalise:
        return Normalise(self.mean, self.std)


class Normalise(nn.Module):
    """uint8 pixels to what the network was trained on: (pixels / 255 - mean) / std, as one multiply and one add.

    Holds buffers that follow `.to(device)` but are in no state_dict.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        means, stds = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
        self.register_buffer("scale", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("shift", (-means / stds).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.to(torch.float32), self.scale)


def portable(scheme: str, name: str, options: Mapping[str, str]) -> str:
    """A spec string without what only means something on this machine or was an order for this one opening."""
    kept = "&".join(f"{key}={value}" for key, value in sorted(options.items()) if key not in ("weights", "seed"))
    return f"{scheme}:{name}" + (f"?{kept}" if kept else "")
