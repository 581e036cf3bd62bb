"""`recipe_text` gives a recipe as it can be typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redistill.views import Recipe, parse_recipe
from redistill.views.recipe_spec import recipe_text


@pytest.mark.parametrize(
    "text",
    [
        "center?size=224&crop_pct=0.875",
        "center?size=32&crop_pct=1.0",
        "center?size=224&crop_pct=0.9&hflip=0.5",
        "rrc?size=224",
        "rrc?size=192&scale=0.5,1.0&ratio=0.9,1.1&hflip=0.0",
        "rrc?size=64&vflip=0.25&interpolation=bicubic&antialias=false",
        "rrc?size=224&aa=rand-m7-n2",
        "rrc?size=224&aa=ta_wide&aa_interpolation=bilinear",
        "rrc?size=224&color_jitter=0.4,0.4,0.4,0.1&color_jitter_prob=0.8&grayscale_prob=0.2",
        "rrc?size=224&gaussian_blur_prob=0.5&blur_sigma=0.1,2.0&blur_kernel=23",
        "rrc?size=224&reprob=0.25&rescale=0.02,0.2&reratio=0.3,3.3&revalue=1,2,3",
        "cifar?size=32",
        "cifar?size=32&padding=2&padding_mode=reflect&mixup=0.2",
        "cifar?size=32&mixup=0.8&cutmix=1.0&mixup_prob=0.9&mixup_switch_prob=0.3",
    ],
)
def test_a_recipe_string_comes_back(text: str):
    recipe = parse_recipe(text)
    assert recipe_text(recipe) == text
    assert recipe_text(Recipe.from_json(json.loads(json.dumps(recipe.to_json())))) == text


@pytest.mark.parametrize("text", ["rrc", "cifar?cutmix=1", "center?size=96", "rrc?color_jitter=0.4&reprob=0.1"])
def test_defaults_are_stated_so_that_the_recipe_is_the_same(text: str):
    assert parse_recipe(recipe_text(parse_recipe(text))) == parse_recipe(text)


def test_what_only_a_file_can_state_is_shown_whole(tmp_path: Path):
    """Steps in another order than that of the options."""
    recipe = parse_recipe("rrc?size=64&grayscale_prob=0.5")
    turned = Recipe(size=64, steps=(recipe.steps[0], *reversed(recipe.steps[1:])))
    assert json.loads(recipe_text(turned)) == turned.to_json()
