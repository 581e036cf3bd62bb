"""What must be known about a model besides its weights.

A `ModelInfo` comes from several sources, each of which may leave fields unknown, in this order of precedence: the
options of the spec, the header of the weights file, the declaration of the publisher, the convention of the family. A
field that is needed and still unknown is an error and never guessed: with the wrong normalisation a teacher runs, and
its logits are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from redistill_cache.errors import Refused, UsageError
from redistill_cache.strict_json import Fields, Json
from torch import Tensor, nn

from redistill.specs import Spec, did_you_mean

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "HALF",
    "IMAGENET",
    "LOCAL_OPTIONS",
    "NORMS",
    "OPTIONS",
    "Blueprint",
    "ModelInfo",
    "Norm",
    "Normalise",
    "OpenedModel",
    "Published",
    "portable",
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
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "random")

OPTIONS = frozenset({"num_classes", "size", "mean", "std", "norm", "weights", "key", "seed"})
# These belong to one machine or run, and not to an architecture.
LOCAL_OPTIONS = frozenset({"weights", "key", "seed"})

MAX_CLASSES, MAX_SIZE = 1 << 20, 1 << 14


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Every field may be unknown (None)."""

    num_classes: int | None = None
    input_size: int | None = None
    """Side of the square input in pixels."""
    norm: Norm | None = None
    interpolation: str | None = None
    """How the authors resize for evaluation: a hint for recipes."""
    resize: int | None = None
    """The shorter side before the authors' centre crop: a hint for recipes."""
    trained_size: int | None = None
    """Side of the views in training, where that may differ from the size the network is built for."""
    top1: float | None = None
    """Share of the validation images that are classified correctly, as its authors or the run that trained it say."""
    class_names: tuple[str, ...] | None = None
    """In the order of the logits."""

    def or_else(self, other: ModelInfo) -> ModelInfo:
        """This, with unknown fields taken from `other`."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return ModelInfo(**{name: second if first is None else first for name, (first, second) in pairs.items()})

    def to_json(self) -> dict[str, Any]:
        known = {name: value for name, value in asdict(self).items() if value is not None and name != "norm"}
        if self.norm is not None:
            known |= {"mean": list(self.norm.mean), "std": list(self.norm.std)}
        return known

    @classmethod
    def from_json(cls, value: Json, where: str) -> ModelInfo:
        """From the header of a weights file, which is untrusted. Unknown keys may be those of a newer version."""
        return cls._read(Fields(value, where, Refused), size="input_size")

    @classmethod
    def from_options(cls, spec: Spec) -> ModelInfo:
        """From num_classes=, size=, norm= or mean= and std= of a spec string."""
        values: dict[str, Json] = {key: spec.take(key, 0) for key in ("num_classes", "size") if key in spec.options}
        values |= {key: _numbers(spec, key) for key in ("mean", "std") if key in spec.options}
        if "norm" in spec.options:
            if "mean" in values or "std" in values:
                raise UsageError(f"{spec.text!r}: expected either norm=NAME, or mean= and std=, found both")
            name = spec.options["norm"]
            if name not in NORMS:
                raise UsageError(f"{spec.text!r}: unknown norm={name!r}; {did_you_mean(name, NORMS)}")
            values |= NORMS[name]._asdict()
        return cls._read(Fields(values, repr(spec.text), UsageError), size="size")

    @classmethod
    def _read(cls, values: Fields, *, size: str) -> ModelInfo:
        """`size` is the key of the input size."""
        return cls(
            num_classes=_integer(values, "num_classes", MAX_CLASSES),
            input_size=_integer(values, size, MAX_SIZE),
            norm=_norm(values),
            interpolation=None if _unknown(values, "interpolation") else values.choice("interpolation", INTERPOLATIONS),
            resize=_integer(values, "resize", MAX_SIZE),
            trained_size=_integer(values, "trained_size", MAX_SIZE),
            top1=None if _unknown(values, "top1") else values.number("top1", 0.0, 1.0),
            class_names=None if _unknown(values, "class_names") else values.texts("class_names", MAX_CLASSES),
        )


def _unknown(values: Fields, key: str) -> bool:
    return key not in values or values.is_null(key)


def _integer(values: Fields, key: str, high: int) -> int | None:
    return None if _unknown(values, key) else values.integer(key, 1, high)


def _norm(values: Fields) -> Norm | None:
    """mean and std, which need each other."""
    if _unknown(values, "mean") and _unknown(values, "std"):
        return None
    mean, std = values.numbers("mean", 3), values.numbers("std", 3)
    if min(std) <= 0:
        values.refuse("std", "a list of 3 numbers above 0")
    return Norm((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _numbers(spec: Spec, key: str) -> list[float]:
    try:
        return [float(part) for part in spec.options[key].split(",")]
    except ValueError:
        raise UsageError(
            f"{spec.text!r}: option {key} must be numbers as in 0.5,0.5,0.5, found {spec.options[key]!r}"
        ) from None


@dataclass(frozen=True)
class Published:
    """Weights that a library publishes under a name."""

    state: Mapping[str, Tensor]
    info: ModelInfo
    source: str


def unknown_info(num_classes: int) -> ModelInfo:
    del num_classes
    return ModelInfo()


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """How to build one member of a family of models (torchvision, timm, cifar, ...), and its default information."""

    name: str
    build: Callable[[int, int | None], nn.Module]
    """(num_classes, input_size) -> the network with fresh weights."""
    published: Callable[[str, int | None], Published] | None = None
    """(weights=NAME, the size requested) -> the weights published under that name; None if there are none."""
    published_names: tuple[str, ...] = ()
    fresh_info: Callable[[int], ModelInfo] = unknown_info
    """num_classes -> the family's convention, for a network with fresh weights."""
    file_info: Callable[[int], ModelInfo] = unknown_info
    """num_classes -> the fallback for weights from a file, whose header may be missing."""
    has_weights: bool = False
    """`build` returns a network with its own weights (python: callables load them)."""


@dataclass(frozen=True)
class OpenedModel:
    """A network on the CPU in float32, with the information needed to use it. Made by `open_model`."""

    module: nn.Module
    spec: str
    """As requested, with paths; `portable_spec` is the one to store."""
    name: str
    num_classes: int
    input_size: int | None
    """Side of the square input in pixels; None if neither the network nor its weights determine it."""
    mean: Triple
    std: Triple
    weights_digest: str | None
    """`state_digest` of the loaded state; None for fresh weights without weights=random."""
    weights_source: str | None
    """"file", "random" (requested), the label of a library, "python", or None: a student before training."""
    interpolation: str | None = None
    resize: int | None = None
    portable_spec: str = ""
    """The spec without paths: it opens the same architecture on any machine."""
    trained_size: int | None = None
    top1: float | None = None
    class_names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.spec

    @property
    def view_size(self) -> int | None:
        """Side of the views the network is used on: that of its training, else the size it is built for."""
        return self.trained_size or self.input_size

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            num_classes=self.num_classes,
            input_size=self.input_size,
            norm=Norm(self.mean, self.std),
            interpolation=self.interpolation,
            resize=self.resize,
            trained_size=self.trained_size,
            top1=self.top1,
            class_names=self.class_names,
        )

    def metadata(self) -> dict[str, Any]:
        """For `save_weights`: a file with this header opens without options."""
        return {"spec": self.portable_spec, **self.info.to_json()}

    def describe(self) -> dict[str, Any]:
        """For an archive: everything that determines the logits, without paths of this machine."""
        return {
            "name": self.name,
            "weights_digest": self.weights_digest,
            "weights_source": self.weights_source,
            **replace(self, top1=None, class_names=None).metadata(),
        }

    def normalise(self) -> Normalise:
        return Normalise(self.mean, self.std)


class Normalise(nn.Module):
    """uint8 pixels to network inputs: (pixels / 255 - mean) / std, as one multiply and one add.

    Its buffers follow `.to(device)` but are in no state_dict.
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
    """The spec string of an architecture: without the options that belong to one machine or run."""
    portable_options = "&".join(f"{k}={v}" for k, v in sorted(options.items()) if k not in LOCAL_OPTIONS)
    return f"{scheme}:{name}" + (f"?{portable_options}" if portable_options else "")
