"""A recipe: the declared augmentation as data, and the integer arrays that hold its draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from redistill_cache.arrays import ArraySpec
from redistill_cache.errors import NewerFormat, UsageError

from redistill.views.steps import (
    CROPS,
    MAX_SIZE,
    ColorJitter,
    Crop,
    Flip,
    GaussianBlur,
    Grayscale,
    Mix,
    RandAugment,
    RandomErasing,
    Step,
    TrivialAugmentWide,
    read_fields,
    step_from_json,
    step_to_json,
)

__all__ = ["INTERPOLATIONS", "RECIPE_VERSION", "Recipe"]

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
        if kinds[:1] != ["crop"] or len(set(kinds)) != len(kinds) or Mix.name in kinds[:-1]:
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
        return self.find(Mix) is not None

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
