"""Recipes: strings with options, TOML files, conversion to and from JSON, and refusal of unknown fields."""

from __future__ import annotations

import json

import pytest
from redistill_cache.errors import NewerFormat, UsageError

from redistill.views import Recipe, parse_recipe
from redistill.views.recipe import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Mixing,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    TrivialAugmentWide,
)

EVERYTHING = (
    "rrc?size=160&scale=0.2,1&ratio=0.7,1.4&hflip=0.4&vflip=0.1&interpolation=bicubic&antialias=0"
    "&color_jitter=0.4,0.3,0.2,0.1&color_jitter_prob=0.8&aa=rand-m7-n3&aa_interpolation=bilinear&grayscale_prob=0.2"
    "&gaussian_blur_prob=0.5&blur_sigma=0.2,1.5&blur_kernel=9&reprob=0.3&rescale=0.1,0.2&reratio=0.5,2&revalue=1,2,3"
    "&mixup=0.2&cutmix=1&mixup_prob=0.9&mixup_switch_prob=0.3"
)


def test_names():
    assert parse_recipe("rrc") == Recipe(size=224, steps=(RandomResizedCrop(), Flip()))
    assert parse_recipe("cifar") == Recipe(size=32, steps=(RandomCrop(padding=4), Flip()))
    assert parse_recipe("center") == Recipe(size=224, steps=(CenterCrop(crop_pct=0.875),))
    assert parse_recipe("center?size=32") == Recipe(size=32, steps=(CenterCrop(crop_pct=1.0),))


def test_every_option_is_applied():
    recipe = parse_recipe(EVERYTHING)
    assert (recipe.size, recipe.interpolation, recipe.antialias) == (160, "bicubic", False)
    assert recipe.crop == RandomResizedCrop(scale=(0.2, 1.0), ratio=(0.7, 1.4))
    assert recipe.find(Flip) == Flip(hflip=0.4, vflip=0.1)
    assert recipe.find(ColorJitter) == ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, p=0.8)
    assert recipe.augment == RandAugment(num_ops=3, magnitude=7, interpolation="bilinear")
    assert recipe.find(GaussianBlur) == GaussianBlur(p=0.5, sigma=(0.2, 1.5), kernel_size=9)
    assert recipe.find(RandomErasing) == RandomErasing(p=0.3, scale=(0.1, 0.2), ratio=(0.5, 2.0), value=(1, 2, 3))
    assert recipe.find(Mixing) == Mixing(mixup=0.2, cutmix=1.0, p=0.9, switch=0.3)


def test_short_forms_have_the_meaning_of_timm():
    assert parse_recipe("rrc?color_jitter=0.4").find(ColorJitter) == ColorJitter()
    assert parse_recipe("rrc?color_jitter=0.1,0.2,0.3").find(ColorJitter) == ColorJitter(
        brightness=0.1, contrast=0.2, saturation=0.3
    )
    assert parse_recipe("cifar?aa=ta_wide").augment == TrivialAugmentWide()
    assert parse_recipe("cifar?aa=rand").augment == RandAugment(num_ops=2, magnitude=9)
    assert parse_recipe("cifar?hflip=0").steps == (RandomCrop(),)
    assert parse_recipe("rrc?reprob=1&revalue=128").find(RandomErasing) == RandomErasing(p=1.0, value=(128,) * 3)


@pytest.mark.parametrize(
    "text", ["rrc", "cifar?padding_mode=reflect", "center", "cifar?aa=ta_wide&cutmix=1", EVERYTHING]
)
def test_json_round_trip(text):
    recipe = parse_recipe(text)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_arrays_are_only_those_the_recipe_needs():
    assert [spec.name for spec in parse_recipe("center").arrays()] == ["crop"]
    assert [spec.name for spec in parse_recipe("rrc").arrays()] == ["crop", "flip"]
    every = ["crop", "flip", "jitter", "ops", "gray", "blur", "erase", "mix_partner", "mix_weight", "mix_box"]
    assert [spec.name for spec in parse_recipe(EVERYTHING).arrays()] == every


def test_toml_with_options(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "rrc"\nsize = 160\nscale = [0.2, 1]\naa = "rand-m9-n2"\nantialias = false\n')
    assert parse_recipe(str(path)) == parse_recipe("rrc?size=160&scale=0.2,1&aa=rand-m9-n2&antialias=no")


def test_toml_with_ops_in_another_order(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'size = 64\n[[ops]]\nop = "center_crop@1"\ncrop_pct = 1\n[[ops]]\nop = "grayscale@1"\np = 0.5\n'
        '[[ops]]\nop = "flip@1"\nhflip = 0.5\nvflip = 0\n'
    )
    assert [step.name for step in parse_recipe(str(path)).steps] == ["center_crop@1", "grayscale@1", "flip@1"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rcc", "rrc"),
        ("rrc:imagenet", "unknown recipe"),
        ("rrc?padding=4", "unknown option 'padding'"),
        ("cifar?scale=0.1,1", "unknown option 'scale'"),
        ("rrc?size=0", "size in [1, 4096], found 0"),
        ("rrc?size=many", "must be an integer"),
        ("rrc?scale=0.5", "2 numbers"),
        ("rrc?scale=1,0.5", "low <= high"),
        ("rrc?scale=0.1,2", "scale to be low,high"),
        ("rrc?ratio=0,1", "ratio"),
        ("rrc?hflip=1.5", "hflip to be a probability"),
        ("rrc?hflip=nan", "hflip"),
        ("rrc?interpolation=lanczos", "bilinear or bicubic or nearest"),
        ("rrc?aa=rand-m9-mstd0.5", "rand-m9-n2"),
        ("rrc?aa=rand-m9-m3", "rand-m9-n2"),
        ("rrc?aa=augmix", "ta_wide"),
        ("rrc?aa=rand-m31", "[0, 30]"),
        ("rrc?aa=rand-n99", "1 to 8"),
        ("rrc?aa_interpolation=bilinear", "has no effect without aa"),
        ("rrc?mixup_prob=0.5", "has no effect without mixup or cutmix"),
        ("rrc?color_jitter=0.1,0.2", "1 or 3 or 4 numbers"),
        ("rrc?color_jitter=0.1,0.1,0.1,0.7", "hue in [0, 0.5]"),
        ("rrc?gaussian_blur_prob=1&blur_kernel=4", "odd blur_kernel"),
        ("rrc?mixup=100", "mixup to be 0 or in"),
        ("rrc?reprob=0.5&revalue=300", "levels"),
        ("center?crop_pct=0", "crop_pct"),
        ("cifar?padding_mode=edge", "constant or reflect"),
        ("nowhere.toml", "no recipe file at nowhere.toml"),
    ],
)
def test_misspelt_or_invalid_options_are_named(text, part):
    with pytest.raises(UsageError) as caught:
        parse_recipe(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_toml_that_is_not_toml(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("size = = 3")
    with pytest.raises(UsageError, match=r"bad\.toml"):
        parse_recipe(str(path))
    path.write_text("size = 3")
    with pytest.raises(UsageError, match="expected recipe ="):
        parse_recipe(str(path))


def changed(**changes):
    return {**parse_recipe("rrc").to_json(), **changes}


CROP = {"op": "random_resized_crop@1", "scale": [0.08, 1.0], "ratio": [0.75, 1.33]}
HOSTILE = {
    "not an object": [],
    "no version": {key: value for key, value in changed().items() if key != "version"},
    "version is a bool": changed(version=True),
    "version is text": changed(version="1"),
    "unknown field": changed(url="http://example.org"),
    "missing field": {key: value for key, value in changed().items() if key != "size"},
    "size is a float": changed(size=224.0),
    "size is a bool": changed(size=True),
    "size is a bomb": changed(size=10**9),
    "antialias is a number": changed(antialias=1),
    "interpolation is unknown": changed(interpolation="sinc"),
    "ops is an object": changed(ops={}),
    "no ops": changed(ops=[]),
    "too many ops": changed(ops=[CROP] * 1000),
    "op is a string": changed(ops=["crop"]),
    "unknown op": changed(ops=[{**CROP, "op": "random_resized_crop@2"}]),
    "op is not text": changed(ops=[{**CROP, "op": 3}]),
    "unknown field of an op": changed(ops=[{**CROP, "seed": 3}]),
    "missing field of an op": changed(ops=[{"op": "random_resized_crop@1", "scale": [0.08, 1.0]}]),
    "scale has three numbers": changed(ops=[{**CROP, "scale": [0.08, 1.0, 2.0]}]),
    "scale is a number": changed(ops=[{**CROP, "scale": 0.5}]),
    "crop_pct is text": changed(ops=[{"op": "center_crop@1", "crop_pct": "0.9"}]),
    "padding is a float": changed(ops=[{"op": "random_crop@1", "padding": 4.0, "padding_mode": "constant"}]),
    "revalue has two colours": changed(
        ops=[CROP, {"op": "random_erasing@1", "p": 0.5, "scale": [0.1, 0.2], "ratio": [0.5, 2], "value": [0, 0]}]
    ),
    "revalue is a float": changed(
        ops=[CROP, {"op": "random_erasing@1", "p": 0.5, "scale": [0.1, 0.2], "ratio": [0.5, 2], "value": [0, 0, 0.5]}]
    ),
    "scale is text": changed(ops=[{**CROP, "scale": ["0.08", "1"]}]),
    "scale is infinite": changed(ops=[{**CROP, "scale": [0.08, float("inf")]}]),
    "scale is not a number": changed(ops=[{**CROP, "scale": [0.08, float("nan")]}]),
    "no crop": changed(ops=[{"op": "flip@1", "hflip": 0.5, "vflip": 0.0}]),
    "two crops": changed(ops=[CROP, CROP]),
    "mix before another": changed(
        ops=[
            CROP,
            {"op": "mix@1", "mixup": 1.0, "cutmix": 0.0, "p": 1.0, "switch": 0.5},
            {"op": "grayscale@1", "p": 0.1},
        ]
    ),
    "two augments": changed(
        ops=[
            CROP,
            {"op": "rand_augment@1", "num_ops": 1, "magnitude": 1, "interpolation": "nearest"},
            {"op": "trivial_augment_wide@1", "interpolation": "nearest"},
        ]
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_untrusted_recipes_are_refused_unless_valid(data):
    with pytest.raises(UsageError) as caught:
        Recipe.from_json(data)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_the_unchanged_recipe_is_accepted():
    assert Recipe.from_json(changed()) == parse_recipe("rrc")


def test_a_newer_version_is_refused_as_such():
    with pytest.raises(NewerFormat, match="found 2"):
        Recipe.from_json(changed(version=2))
