"""A recipe: the declared augmentation as data, and the integer arrays that hold its draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from redistill_cache.errors import NewerFormat, UsageError
from redistill_cache.spec import ArraySpec

from redistill.specs import did_you_mean

__all__ = [
    "BLUR_UNIT",
    "CROPS",
    "EDGE_UNIT",
    "INTERPOLATIONS",
    "JITTER_UNIT",
    "MAX_SIZE",
    "RECIPE_VERSION",
    "STEPS",
    "WEIGHT_UNIT",
    "CenterCrop",
    "ColorJitter",
    "Crop",
    "Flip",
    "GaussianBlur",
    "Grayscale",
    "Mixing",
    "RandAugment",
    "RandomCrop",
    "RandomErasing",
    "RandomResizedCrop",
    "Recipe",
    "Step",
    "TrivialAugmentWide",
    "edge_pixels",
    "read_fields",
    "step_from_json",
    "step_to_json",
]


# -- units ------------------------------------------------------------------------------------------------------------
#
# The units of stored parameters: integers in the archive, fractions in the arithmetic. Part of the format.

JITTER_UNIT = 1 << 13  # colour factors and hue shifts
BLUR_UNIT = 1 << 12  # sigma, in pixels at the recipe's size
EDGE_UNIT = 1 << 15  # edges of boxes within a view, as fractions of its side
WEIGHT_UNIT = 65535  # the share of a row's own view in a mixed one


def edge_pixels(stored: int, side: int) -> int:
    """The pixel edge at a rendered side: the nearest, ties up; gives back the drawn pixel at the drawn side."""
    return (2 * stored * side + EDGE_UNIT) // (2 * EDGE_UNIT)


# -- steps ------------------------------------------------------------------------------------------------------------
#
# The steps a recipe is made of: what each one is called, what it is told, and what values make sense.
#
# A step's name carries the version of its meaning ("flip@1"); a changed meaning is a new name, and a name this
# reader does not know is refused. Options and defaults are those of torchvision's transforms, or of timm where
# torchvision has none.

Pair = tuple[float, float]

MAX_SIZE = 4096
MAX_OPS = 8


def demand(true: bool, what: str) -> None:
    if not true:
        raise UsageError(f"recipe: {what}")


def demand_chance(name: str, value: float) -> None:
    demand(0.0 <= value <= 1.0, f"expected {name} to be a probability in [0, 1], found {value}")


def demand_range(name: str, value: Pair, low: float, high: float) -> None:
    found = f"expected {name} to be low,high with {low:g} <= low <= high <= {high:g}, found {value[0]:g},{value[1]:g}"
    demand(low <= value[0] <= value[1] <= high, found)


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The central square of `crop_pct` times the shorter side, resized."""

    name: ClassVar[str] = "center_crop@1"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        demand(0.0 < self.crop_pct <= 1.0, f"expected crop_pct in (0, 1], found {self.crop_pct}")


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A box of a random share of the area and a random aspect ratio, resized: torchvision's RandomResizedCrop."""

    name: ClassVar[str] = "random_resized_crop@1"
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        demand_range("scale", self.scale, 1e-6, 1.0)
        demand_range("ratio", self.ratio, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A box of the recipe's size from the image padded on every side: torchvision's RandomCrop."""

    name: ClassVar[str] = "random_crop@1"
    padding: int = 4
    padding_mode: str = "constant"

    def __post_init__(self) -> None:
        demand(0 <= self.padding <= MAX_SIZE, f"expected padding in [0, {MAX_SIZE}], found {self.padding}")
        modes = ("constant", "reflect")
        demand(self.padding_mode in modes, f"expected padding_mode {' or '.join(modes)}, found {self.padding_mode!r}")


@dataclass(frozen=True, kw_only=True)
class Flip:
    name: ClassVar[str] = "flip@1"
    hflip: float = 0.5
    vflip: float = 0.0

    def __post_init__(self) -> None:
        demand_chance("hflip", self.hflip)
        demand_chance("vflip", self.vflip)


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in a random order: torchvision's ColorJitter, with probability p."""

    name: ClassVar[str] = "color_jitter@1"
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        for part, most in (("brightness", 2.0), ("contrast", 2.0), ("saturation", 2.0), ("hue", 0.5)):
            value = getattr(self, part)
            demand(0.0 <= value <= most, f"expected color_jitter {part} in [0, {most:g}], found {value:g}")
        demand_chance("color_jitter_prob", self.p)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` random operations at magnitude `magnitude` of 30: torchvision's RandAugment."""

    name: ClassVar[str] = "rand_augment@1"
    num_ops: int = 2
    magnitude: int = 9
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        demand(1 <= self.num_ops <= MAX_OPS, f"expected 1 to {MAX_OPS} operations in aa, found {self.num_ops}")
        demand(0 <= self.magnitude <= 30, f"expected the magnitude of aa in [0, 30], found {self.magnitude}")
        demand_affine_interpolation(self.interpolation)


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentWide:
    """One random operation at a random magnitude: torchvision's TrivialAugmentWide."""

    name: ClassVar[str] = "trivial_augment_wide@1"
    num_ops: ClassVar[int] = 1
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        demand_affine_interpolation(self.interpolation)


def demand_affine_interpolation(mode: str) -> None:
    demand(mode in ("nearest", "bilinear"), f"expected aa_interpolation nearest or bilinear, found {mode!r}")


@dataclass(frozen=True, kw_only=True)
class Grayscale:
    name: ClassVar[str] = "grayscale@1"
    p: float = 0.1

    def __post_init__(self) -> None:
        demand_chance("grayscale_prob", self.p)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """torchvision's GaussianBlur with probability p; kernel size and sigma are pixels at the recipe's size."""

    name: ClassVar[str] = "gaussian_blur@1"
    p: float = 0.1
    sigma: Pair = (0.1, 2.0)
    kernel_size: int = 23

    def __post_init__(self) -> None:
        demand_chance("gaussian_blur_prob", self.p)
        demand_range("blur_sigma", self.sigma, 0.01, 15.0)
        odd = self.kernel_size % 2 == 1 and 1 <= self.kernel_size <= 255
        demand(odd, f"expected an odd blur_kernel in [1, 255], found {self.kernel_size}")


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """A box filled with one colour, with probability p: torchvision's RandomErasing on the pixels of the view."""

    name: ClassVar[str] = "random_erasing@1"
    p: float = 0.25
    scale: Pair = (0.02, 0.33)
    ratio: Pair = (0.3, 3.3)
    value: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        demand_chance("reprob", self.p)
        demand_range("rescale", self.scale, 0.0, 1.0)
        demand_range("reratio", self.ratio, 1e-3, 1e3)
        demand(all(0 <= v <= 255 for v in self.value), f"expected revalue as colours in [0, 255], found {self.value}")


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """MixUp, CutMix or either, with another row's view of the same index; alphas, p and switch as in timm."""

    name: ClassVar[str] = "mix@1"
    mixup: float = 0.0
    cutmix: float = 0.0
    p: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        for part in ("mixup", "cutmix"):
            alpha = getattr(self, part)
            demand(alpha == 0.0 or 0.01 <= alpha <= 16.0, f"expected {part} to be 0 or in [0.01, 16], found {alpha}")
        demand(self.mixup > 0.0 or self.cutmix > 0.0, "mix needs mixup or cutmix above 0")
        demand_chance("mixup_prob", self.p)
        demand_chance("mixup_switch_prob", self.switch)


Crop = CenterCrop | RandomResizedCrop | RandomCrop
Step = Crop | Flip | ColorJitter | RandAugment | TrivialAugmentWide | Grayscale | GaussianBlur | RandomErasing | Mixing
CROPS = (CenterCrop, RandomResizedCrop, RandomCrop)
STEPS: Mapping[str, type[Step]] = {
    kind.name: kind
    for kind in (
        *CROPS,
        Flip,
        ColorJitter,
        RandAugment,
        TrivialAugmentWide,
        Grayscale,
        GaussianBlur,
        RandomErasing,
        Mixing,
    )
}


def step_to_json(step: Step) -> dict[str, Any]:
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(step).items()}
    return {"op": step.name, **fields}


def step_from_json(data: object) -> Step:
    """A step from data of unknown origin: every field present, none unknown, each of its type and in its range."""
    if not isinstance(data, dict) or not isinstance(data.get("op"), str):
        raise UsageError("recipe: expected every op to be an object with a string 'op'")
    kind = STEPS.get(data["op"])
    if kind is None:
        raise UsageError(
            f"recipe: unknown op {data['op'][:60]!r}; this version {did_you_mean(data['op'][:60], STEPS)}; "
            "an archive made by a newer redistill needs that version"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    return kind(**read_fields(kind.name, {k: v for k, v in data.items() if k != "op"}, defaults))


def read_fields(owner: str, data: Mapping[str, object], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `data` with the types of `defaults`; exactly the same keys."""
    if data.keys() != defaults.keys():
        odd = sorted(str(key)[:60] for key in data.keys() ^ defaults.keys())
        raise UsageError(f"recipe: {owner} has exactly the fields {', '.join(defaults)}; missing or unknown: {odd}")
    return {key: _read(f"{owner} {key}", data[key], default) for key, default in defaults.items()}


def _read(where: str, value: object, like: Any) -> Any:  # noqa: ANN401  the type is that of `like`
    if isinstance(like, tuple):
        if isinstance(value, list) and len(value) == len(like):
            return tuple(_read(where, item, element) for item, element in zip(value, like, strict=True))
    elif isinstance(like, float):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is type(like):
        return value
    shape = f"a list of {len(like)}" if isinstance(like, tuple) else type(like).__name__
    raise UsageError(f"recipe: expected {where} to be {shape}, found {str(value)[:60]!r}")


# -- recipe -----------------------------------------------------------------------------------------------------------

RECIPE_VERSION = 1
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
AUGMENTS = (RandAugment, TrivialAugmentWide)

AnyStep = TypeVar("AnyStep")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to an image, in order: a crop first, mixing (if any) last, every kind of step at most once.

    `size` is the canonical size: what a view is rendered at unless told otherwise, and the unit of everything that is
    stated in pixels of the view.
    """

    size: int
    steps: tuple[Step, ...]
    interpolation: str = "bilinear"
    antialias: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise UsageError(f"recipe: expected size in [1, {MAX_SIZE}], found {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            found = f"found {self.interpolation[:60]!r}"
            raise UsageError(f"recipe: expected interpolation {' or '.join(INTERPOLATIONS)}, {found}")
        kinds = ["crop" if isinstance(s, CROPS) else "aa" if isinstance(s, AUGMENTS) else s.name for s in self.steps]
        if kinds[:1] != ["crop"] or len(set(kinds)) != len(kinds) or Mixing.name in kinds[:-1]:
            names = ", ".join(step.name for step in self.steps)
            raise UsageError(f"recipe: expected one crop first, mixing last and no step twice, found {names or 'none'}")

    def find(self, kind: type[AnyStep]) -> AnyStep | None:
        """The step of this kind, if the recipe has one."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    @property
    def crop(self) -> Crop:
        first = self.steps[0]
        assert isinstance(first, CROPS)
        return first

    @property
    def augment(self) -> RandAugment | TrivialAugmentWide | None:
        return self.find(RandAugment) or self.find(TrivialAugmentWide)

    @property
    def mixes(self) -> bool:
        return self.find(Mixing) is not None

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays `views/...` of an archive that hold this recipe's parameters."""
        arrays = [ArraySpec("crop", "int32", (4,), transpose=True)]
        if self.find(Flip):
            arrays.append(ArraySpec("flip", "uint8"))
        if self.find(ColorJitter):
            arrays.append(ArraySpec("jitter", "int16", (5,), transpose=True))
        if self.augment:
            arrays.append(ArraySpec("ops", "int16", (self.augment.num_ops, 2), transpose=True))
        if self.find(Grayscale):
            arrays.append(ArraySpec("gray", "uint8"))
        if self.find(GaussianBlur):
            arrays.append(ArraySpec("blur", "uint16"))
        if self.find(RandomErasing):
            arrays.append(ArraySpec("erase", "uint16", (4,), transpose=True))
        if self.mixes:
            arrays.append(ArraySpec("mix_partner", "uint32"))
            arrays.append(ArraySpec("mix_weight", "uint16"))
            arrays.append(ArraySpec("mix_box", "uint16", (4,), transpose=True))
        return tuple(arrays)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": RECIPE_VERSION,
            "size": self.size,
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "ops": [step_to_json(step) for step in self.steps],
        }

    @classmethod
    def from_json(cls, data: object) -> Recipe:
        """A recipe from data of unknown origin (an archive, a file); anything not understood is refused."""
        if not isinstance(data, Mapping):
            raise UsageError(f"recipe: expected an object, found {type(data).__name__}")
        version = data.get("version")
        if type(version) is int and version > RECIPE_VERSION:
            raise NewerFormat(f"recipe: expected version {RECIPE_VERSION}, found {version}; use a newer redistill")
        if version != RECIPE_VERSION or type(version) is not int:
            raise UsageError(f"recipe: expected version {RECIPE_VERSION}, found {str(version)[:60]!r}")
        steps = data.get("ops")
        if not isinstance(steps, list) or not 1 <= len(steps) <= 16:
            raise UsageError("recipe: expected 'ops' to be a list of 1 to 16 operations")
        head = {key: value for key, value in data.items() if key not in ("version", "ops")}
        fields = read_fields("recipe", head, {"size": 0, "interpolation": "", "antialias": True})
        return cls(steps=tuple(step_from_json(step) for step in steps), **fields)
