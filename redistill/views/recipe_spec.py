"""Recipe strings such as `rrc?size=224&aa=rand-m9-n2`, and TOML files with the same options or a list of ops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from redistill_cache.errors import UsageError

from redistill.specs import Spec, did_you_mean, parse_spec
from redistill.strict_toml import read_toml
from redistill.views.recipe import (
    RECIPE_VERSION,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Mixing,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Recipe,
    Step,
    TrivialAugmentWide,
)

__all__ = ["parse_recipe", "recipe_text"]

CROP_OPTIONS = {
    "center": ("crop_pct",),
    "rrc": ("scale", "ratio"),
    "cifar": ("padding", "padding_mode"),
}
DEFAULT_SIZES = {"center": 224, "rrc": 224, "cifar": 32}
DEFAULT_HFLIP = {"center": 0.0, "rrc": 0.5, "cifar": 0.5}
COMMON_OPTIONS = (
    *("size", "interpolation", "antialias", "hflip", "vflip"),
    *("color_jitter", "color_jitter_prob", "aa", "aa_interpolation", "grayscale_prob"),
    *("gaussian_blur_prob", "blur_sigma", "blur_kernel", "reprob", "rescale", "reratio", "revalue"),
    *("mixup", "cutmix", "mixup_prob", "mixup_switch_prob"),
)
# Below this size images usually have the size of the network's input, and a center crop takes all of them.
SMALL = 128
# Options that have no effect without another option.
NEEDS = {
    "color_jitter_prob": "color_jitter",
    "aa_interpolation": "aa",
    "blur_sigma": "gaussian_blur_prob",
    "blur_kernel": "gaussian_blur_prob",
    "rescale": "reprob",
    "reratio": "reprob",
    "revalue": "reprob",
    "mixup_prob": "mixup or cutmix",
    "mixup_switch_prob": "mixup or cutmix",
}


def parse_recipe(text: str) -> Recipe:
    """A recipe from `center`, `rrc` or `cifar` with options, or from the path of a TOML file."""
    if text.partition("?")[0].endswith(".toml"):
        return _from_toml(Path(text))
    return _from_spec(parse_spec(text))


def recipe_text(recipe: Recipe) -> str:
    """The recipe as `parse_recipe` takes it; the JSON of its [[ops]] where only a TOML file can state them."""
    text = _spec_text(recipe)
    try:
        exact = parse_recipe(text) == recipe
    except UsageError:
        exact = False
    return text if exact else json.dumps(recipe.to_json())


def _spec_text(recipe: Recipe) -> str:
    """The options that differ from their defaults; steps in another order than that of a spec string are not seen."""
    options: dict[str, object] = {"size": recipe.size}
    crop, default = recipe.crop, RandomResizedCrop()
    match crop:
        case CenterCrop():
            scheme = "center"
            options["crop_pct"] = crop.crop_pct
        case RandomResizedCrop():
            scheme = "rrc"
            options |= {key: value for key, value in vars(crop).items() if value != getattr(default, key)}
        case RandomCrop():
            scheme = "cifar"
            options |= {key: value for key, value in vars(crop).items() if value != getattr(RandomCrop(), key)}
    flip = recipe.find(Flip)
    hflip, vflip = (flip.hflip, flip.vflip) if flip else (0.0, 0.0)
    options |= {} if hflip == DEFAULT_HFLIP[scheme] else {"hflip": hflip}
    options |= {"vflip": vflip} if vflip else {}
    for step in recipe.steps:
        options |= _step_options(step)
    options |= {} if recipe.interpolation == "bilinear" else {"interpolation": recipe.interpolation}
    options |= {} if recipe.antialias else {"antialias": "false"}
    return f"{scheme}?" + "&".join(f"{key}={_plain(value)}" for key, value in options.items())


def _step_options(step: Step) -> Mapping[str, object]:
    match step:
        case ColorJitter():
            strengths = (step.brightness, step.contrast, step.saturation, step.hue)
            return {"color_jitter": strengths} | ({} if step.p == 1 else {"color_jitter_prob": step.p})
        case RandAugment() | TrivialAugmentWide():
            name = f"rand-m{step.magnitude}-n{step.num_ops}" if isinstance(step, RandAugment) else "ta_wide"
            return {"aa": name} | ({} if step.interpolation == "nearest" else {"aa_interpolation": step.interpolation})
        case Grayscale():
            return {"grayscale_prob": step.p}
        case GaussianBlur():
            return {"gaussian_blur_prob": step.p, "blur_sigma": step.sigma, "blur_kernel": step.kernel_size}
        case RandomErasing():
            return {"reprob": step.p, "rescale": step.scale, "reratio": step.ratio, "revalue": step.value}
        case Mixing():
            on = {key: getattr(step, key) for key in ("mixup", "cutmix") if getattr(step, key)}
            switch = {"mixup_switch_prob": step.switch} if len(on) == 2 else {}
            return on | ({} if step.p == 1 else {"mixup_prob": step.p}) | switch
        case _:
            return {}


def _plain(value: object) -> str:
    return ",".join(map(_plain, value)) if isinstance(value, tuple) else str(value)


def _from_toml(path: Path) -> Recipe:
    data = read_toml(path, "recipe file")
    if "ops" in data:
        return Recipe.from_json({"version": RECIPE_VERSION, "interpolation": "bilinear", "antialias": True, **data})
    name = data.pop("recipe", None)
    if not isinstance(name, str):
        raise UsageError(f'recipe file {path}: expected recipe = "rrc" (or center, cifar) with options, or [[ops]]')
    options = "&".join(f"{key}={quote(_option_text(value))}" for key, value in data.items())
    return _from_spec(parse_spec(f"{name}?{options}" if options else name))


def _option_text(value: Any) -> str:  # noqa: ANN401  whatever TOML holds
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _from_spec(spec: Spec) -> Recipe:
    if spec.scheme not in CROP_OPTIONS or spec.name:
        raise UsageError(f"unknown recipe {spec.text!r}; {did_you_mean(spec.scheme, CROP_OPTIONS)}, or a .toml file")
    spec.refuse_unknown((*CROP_OPTIONS[spec.scheme], *COMMON_OPTIONS))
    for option, needed in NEEDS.items():
        if option in spec.options and not any(name in spec.options for name in needed.split(" or ")):
            raise UsageError(f"{spec.text!r}: {option} has no effect without {needed}")
    size = spec.take("size", DEFAULT_SIZES[spec.scheme])
    steps: list[Step | None] = [_crop(spec, size), _flip(spec)]
    steps += [_color_jitter(spec), _augment(spec), _grayscale(spec), _blur(spec, size), _erasing(spec), _mix(spec)]
    return Recipe(
        size=size,
        interpolation=spec.take("interpolation", "bilinear"),
        antialias=spec.take("antialias", True),
        steps=tuple(step for step in steps if step is not None),
    )


def _numbers(spec: Spec, key: str, default: tuple[Any, ...], lengths: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """An option of comma-separated numbers: of the type and length of the default, or one of `lengths`."""
    text = spec.options.get(key)
    if text is None:
        return default
    kind: Callable[[str], Any] = type(default[0])
    lengths = lengths or (len(default),)
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in lengths:
        counts = " or ".join(map(str, lengths))
        raise UsageError(f"{spec.text!r}: expected {key} as {counts} numbers, separated by commas, found {text!r}")
    return values


def _crop(spec: Spec, size: int) -> Step:
    if spec.scheme == "center":
        return CenterCrop(crop_pct=spec.take("crop_pct", 0.875 if size >= SMALL else 1.0))
    if spec.scheme == "rrc":
        default = RandomResizedCrop()
        return RandomResizedCrop(
            scale=_numbers(spec, "scale", default.scale), ratio=_numbers(spec, "ratio", default.ratio)
        )
    return RandomCrop(padding=spec.take("padding", 4), padding_mode=spec.take("padding_mode", "constant"))


def _flip(spec: Spec) -> Step | None:
    hflip, vflip = spec.take("hflip", DEFAULT_HFLIP[spec.scheme]), spec.take("vflip", 0.0)
    return Flip(hflip=hflip, vflip=vflip) if hflip or vflip else None


def _color_jitter(spec: Spec) -> Step | None:
    strengths = _numbers(spec, "color_jitter", (0.0,), lengths=(1, 3, 4))
    if not any(strengths):
        return None
    # As in timm: one number sets brightness, contrast and saturation; hue needs all four numbers.
    brightness, contrast, saturation = strengths[:3] if len(strengths) > 1 else strengths * 3
    hue = strengths[3] if len(strengths) == 4 else 0.0
    p = spec.take("color_jitter_prob", 1.0)
    return ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=p)


def _augment(spec: Spec) -> Step | None:
    text = spec.options.get("aa")
    if not text:
        return None
    interpolation = spec.take("aa_interpolation", "nearest")
    if text == "ta_wide":
        return TrivialAugmentWide(interpolation=interpolation)
    parts = re.fullmatch(r"rand((?:-[mn]\d{1,3})*)", text)
    settings = re.findall(r"([mn])(\d+)", parts[1]) if parts else []
    if not parts or len({letter for letter, _ in settings}) != len(settings):
        raise UsageError(
            f"{spec.text!r}: expected aa=rand-m9-n2 (magnitude of 30, operations) or ta_wide, found {text!r}"
        )
    values: Mapping[str, int] = {"m": 9, "n": 2} | {letter: int(digits) for letter, digits in settings}
    return RandAugment(num_ops=values["n"], magnitude=values["m"], interpolation=interpolation)


def _grayscale(spec: Spec) -> Step | None:
    p = spec.take("grayscale_prob", 0.0)
    return Grayscale(p=p) if p else None


def _blur(spec: Spec, size: int) -> Step | None:
    p = spec.take("gaussian_blur_prob", 0.0)
    if not p:
        return None
    tenth = min(2 * (size // 20) + 1, 255)  # as in SimCLR: a tenth of the size, odd
    kernel_size = spec.take("blur_kernel", max(tenth, 3))
    return GaussianBlur(p=p, sigma=_numbers(spec, "blur_sigma", (0.1, 2.0)), kernel_size=kernel_size)


def _erasing(spec: Spec) -> Step | None:
    p = spec.take("reprob", 0.0)
    if not p:
        return None
    default = RandomErasing()
    value = _numbers(spec, "revalue", default.value, lengths=(1, 3))
    red, green, blue = value if len(value) == 3 else value * 3
    scale, ratio = _numbers(spec, "rescale", default.scale), _numbers(spec, "reratio", default.ratio)
    return RandomErasing(p=p, scale=scale, ratio=ratio, value=(red, green, blue))


def _mix(spec: Spec) -> Step | None:
    mixup, cutmix = spec.take("mixup", 0.0), spec.take("cutmix", 0.0)
    if not mixup and not cutmix:
        return None
    p, switch = spec.take("mixup_prob", 1.0), spec.take("mixup_switch_prob", 0.5)
    return Mixing(mixup=mixup, cutmix=cutmix, p=p, switch=switch)
