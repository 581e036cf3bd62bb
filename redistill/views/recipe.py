"""Recipes: the declared augmentation as data, checked when constructed, and its JSON form.

A recipe is a sequence of steps. A step's name carries the version of its meaning ("flip@1"): a changed meaning gets a
new name, and an unknown name is refused. Options and defaults are those of torchvision's transforms, or of timm where
torchvision has none. The arrays that store the drawn parameters, and their units, are part of the archive format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from redistill_cache.errors import NewerFormat, UsageError
from redistill_cache.spec import ArraySpec
from redistill_cache.strict_json import Fields

from redistill.specs import did_you_mean

__all__ = [
    "BLUR_UNIT",
    "EDGE_UNIT",
    "JITTER_UNIT",
    "MAX_SIZE",
    "RECIPE_VERSION",
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
]

RECIPE_VERSION = 1
MAX_SIZE = 4096
MAX_STEPS = 16
MAX_OPS = 8  # of RandAugment
MAX_TEXT = 60
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")

# Units of the stored integers: one is 1 / UNIT. Part of the format.
JITTER_UNIT = 1 << 13  # colour factors and hue shifts
BLUR_UNIT = 1 << 12  # sigma, in pixels at the recipe's size
EDGE_UNIT = 1 << 15  # edges of boxes within a view, as fractions of its side
WEIGHT_UNIT = 65535  # the weight of a row's own view in a mixed view

Pair = tuple[float, float]


def edge_pixels(stored: int, side: int) -> int:
    """The edge in pixels at a rendered side: rounded, ties up; at the recipe's size, exactly the pixel drawn."""
    return (2 * stored * side + EDGE_UNIT) // (2 * EDGE_UNIT)


# -- steps ------------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"recipe: {message}")


def require_probability(name: str, value: float) -> None:
    require(0.0 <= value <= 1.0, f"expected {name} to be a probability in [0, 1], found {value}")


def require_range(name: str, value: Pair, low: float, high: float) -> None:
    expected = f"expected {name} to be low,high with {low:g} <= low <= high <= {high:g}"
    require(low <= value[0] <= value[1] <= high, f"{expected}, found {value[0]:g},{value[1]:g}")


def require_affine_interpolation(mode: str) -> None:
    require(mode in ("nearest", "bilinear"), f"expected aa_interpolation nearest or bilinear, found {mode!r}")


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The central square, `crop_pct` of the shorter side, resized."""

    name: ClassVar[str] = "center_crop@1"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        require(0.0 < self.crop_pct <= 1.0, f"expected crop_pct in (0, 1], found {self.crop_pct}")


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized: torchvision's RandomResizedCrop."""

    name: ClassVar[str] = "random_resized_crop@1"
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        require_range("scale", self.scale, 1e-6, 1.0)
        require_range("ratio", self.ratio, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A box of the recipe's size from the image, padded on every side: torchvision's RandomCrop."""

    name: ClassVar[str] = "random_crop@1"
    padding: int = 4
    padding_mode: str = "constant"

    def __post_init__(self) -> None:
        require(0 <= self.padding <= MAX_SIZE, f"expected padding in [0, {MAX_SIZE}], found {self.padding}")
        modes = ("constant", "reflect")
        require(self.padding_mode in modes, f"expected padding_mode {' or '.join(modes)}, found {self.padding_mode!r}")


@dataclass(frozen=True, kw_only=True)
class Flip:
    name: ClassVar[str] = "flip@1"
    hflip: float = 0.5
    vflip: float = 0.0

    def __post_init__(self) -> None:
        require_probability("hflip", self.hflip)
        require_probability("vflip", self.vflip)


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue in random order: torchvision's ColorJitter, with probability p."""

    name: ClassVar[str] = "color_jitter@1"
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        for part, limit in (("brightness", 2.0), ("contrast", 2.0), ("saturation", 2.0), ("hue", 0.5)):
            value = getattr(self, part)
            require(0.0 <= value <= limit, f"expected color_jitter {part} in [0, {limit:g}], found {value:g}")
        require_probability("color_jitter_prob", self.p)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` random operations at magnitude `magnitude` of 30: torchvision's RandAugment."""

    name: ClassVar[str] = "rand_augment@1"
    num_ops: int = 2
    magnitude: int = 9
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        require(1 <= self.num_ops <= MAX_OPS, f"expected 1 to {MAX_OPS} operations in aa, found {self.num_ops}")
        require(0 <= self.magnitude <= 30, f"expected the magnitude of aa in [0, 30], found {self.magnitude}")
        require_affine_interpolation(self.interpolation)


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentWide:
    """One random operation at a random magnitude: torchvision's TrivialAugmentWide."""

    name: ClassVar[str] = "trivial_augment_wide@1"
    num_ops: ClassVar[int] = 1
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        require_affine_interpolation(self.interpolation)


@dataclass(frozen=True, kw_only=True)
class Grayscale:
    name: ClassVar[str] = "grayscale@1"
    p: float = 0.1

    def __post_init__(self) -> None:
        require_probability("grayscale_prob", self.p)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """torchvision's GaussianBlur with probability p; kernel size and sigma are pixels at the recipe's size."""

    name: ClassVar[str] = "gaussian_blur@1"
    p: float = 0.1
    sigma: Pair = (0.1, 2.0)
    kernel_size: int = 23

    def __post_init__(self) -> None:
        require_probability("gaussian_blur_prob", self.p)
        require_range("blur_sigma", self.sigma, 0.01, 15.0)
        valid = self.kernel_size % 2 == 1 and 1 <= self.kernel_size <= 255
        require(valid, f"expected an odd blur_kernel in [1, 255], found {self.kernel_size}")


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """A box filled with one colour, with probability p: torchvision's RandomErasing, on uint8 pixels."""

    name: ClassVar[str] = "random_erasing@1"
    p: float = 0.25
    scale: Pair = (0.02, 0.33)
    ratio: Pair = (0.3, 3.3)
    value: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        require_probability("reprob", self.p)
        require_range("rescale", self.scale, 0.0, 1.0)
        require_range("reratio", self.ratio, 1e-3, 1e3)
        valid = len(self.value) == 3 and all(0 <= level <= 255 for level in self.value)
        require(valid, f"expected revalue as three levels in [0, 255], found {self.value}")


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """MixUp, CutMix or either, with the same view of another row; alphas, p and switch as in timm."""

    name: ClassVar[str] = "mix@1"
    mixup: float = 0.0
    cutmix: float = 0.0
    p: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        for part in ("mixup", "cutmix"):
            alpha = getattr(self, part)
            require(alpha == 0.0 or 0.01 <= alpha <= 16.0, f"expected {part} to be 0 or in [0.01, 16], found {alpha}")
        require(self.mixup > 0.0 or self.cutmix > 0.0, "expected mixup or cutmix above 0, found neither")
        require_probability("mixup_prob", self.p)
        require_probability("mixup_switch_prob", self.switch)


Crop = CenterCrop | RandomResizedCrop | RandomCrop
Augment = RandAugment | TrivialAugmentWide
Step = Crop | Augment | Flip | ColorJitter | Grayscale | GaussianBlur | RandomErasing | Mixing
CROPS = (CenterCrop, RandomResizedCrop, RandomCrop)
AUGMENTS = (RandAugment, TrivialAugmentWide)
STEPS: Mapping[str, type[Step]] = {
    kind.name: kind for kind in (*CROPS, *AUGMENTS, Flip, ColorJitter, Grayscale, GaussianBlur, RandomErasing, Mixing)
}


# -- the recipe -------------------------------------------------------------------------------------------------------

AnyStep = TypeVar("AnyStep")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to an image, in order: a crop first, mixing (if any) last, every kind of step at most once.

    `size` is the canonical size: the default side of a rendered view, and the unit of every option that is stated in
    pixels of the view.
    """

    size: int
    steps: tuple[Step, ...]
    interpolation: str = "bilinear"
    antialias: bool = True

    def __post_init__(self) -> None:
        require(1 <= self.size <= MAX_SIZE, f"expected size in [1, {MAX_SIZE}], found {self.size}")
        modes = " or ".join(INTERPOLATIONS)
        valid = self.interpolation in INTERPOLATIONS
        require(valid, f"expected interpolation {modes}, found {self.interpolation[:MAX_TEXT]!r}")
        kinds = ["crop" if isinstance(s, CROPS) else "aa" if isinstance(s, AUGMENTS) else s.name for s in self.steps]
        valid = kinds[:1] == ["crop"] and len(set(kinds)) == len(kinds) and Mixing.name not in kinds[:-1]
        names = ", ".join(step.name for step in self.steps) or "none"
        require(valid, f"expected one crop first, mixing last and no step twice, found {names}")

    def find(self, kind: type[AnyStep]) -> AnyStep | None:
        """The step of this kind, if the recipe has one."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    @property
    def crop(self) -> Crop:
        first = self.steps[0]
        assert isinstance(first, CROPS)
        return first

    @property
    def augment(self) -> Augment | None:
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
            "ops": [_step_to_json(step) for step in self.steps],
        }

    @classmethod
    def from_json(cls, data: object) -> Recipe:
        """A recipe from untrusted data (an archive, a file): every field present and valid, none unknown."""
        fields = Fields(data, "recipe", UsageError)
        version = fields.integer("version", 1, 2**32)
        if version > RECIPE_VERSION:
            raise NewerFormat(f"recipe: expected version {RECIPE_VERSION}, found {version}; use a newer redistill")
        recipe = cls(
            size=fields.integer("size", 1, MAX_SIZE),
            steps=tuple(_step_from_json(step, i) for i, step in enumerate(fields.items("ops", MAX_STEPS))),
            interpolation=fields.choice("interpolation", INTERPOLATIONS),
            antialias=fields.flag("antialias"),
        )
        fields.done()
        return recipe


def _step_to_json(step: Step) -> dict[str, Any]:
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(step).items()}
    return {"op": step.name, **values}


def _step_from_json(data: object, position: int) -> Step:
    fields = Fields(data, f"recipe op {position}", UsageError)
    name = fields.text("op", MAX_TEXT)
    kind = STEPS.get(name)
    if kind is None:
        raise UsageError(
            f"recipe: unknown op {name!r}; {did_you_mean(name, STEPS)} "
            "(an archive written by a newer redistill needs that version)"
        )
    values: dict[str, Any] = {field.name: _read(fields, field) for field in dataclasses.fields(kind)}
    fields.done()
    return kind(**values)


def _read(fields: Fields, field: dataclasses.Field[Any]) -> float | str | tuple[float, ...]:
    """The value of one field, of the type of its default; the step itself checks the range."""
    match field.default:
        case int():
            return fields.integer(field.name, 0, MAX_SIZE)
        case float():
            return fields.number(field.name)
        case (int(), _, _) as colour:
            return fields.integers(field.name, len(colour))
        case tuple() as numbers:
            return fields.numbers(field.name, len(numbers))
    return fields.text(field.name, MAX_TEXT)
