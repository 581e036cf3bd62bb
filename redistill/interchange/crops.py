"""What formats of crops have in common: a box and a flip per view, and the largest probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from redistill_cache.errors import UsageError

from redistill.interchange.foreign import ForeignViews
from redistill.interchange.options import ImportOptions
from redistill.interchange.probabilities import check_top, logits_of_top
from redistill.views.recipe import Flip, RandomResizedCrop, Recipe
from redistill.views.recipe_spec import parse_recipe

__all__ = ["audit_of_crops", "crops_recipe", "views_of_top"]


def crops_recipe(text: str | None) -> Recipe:
    recipe = parse_recipe(text or "rrc")
    flip = recipe.find(Flip)
    has_both = len(recipe.steps) == 2 and isinstance(recipe.crop, RandomResizedCrop) and flip is not None
    if not has_both or flip is None or flip.vflip:
        raise UsageError(
            f"--recipe {text!r}: the source has crops and horizontal flips, nothing else; expected rrc?size=..."
        )
    return recipe


def audit_of_crops(options: ImportOptions, recipe: Recipe, kept: int | None, num_classes: int) -> Iterator[str]:
    stated = "stated by the user" if options.temperature else "not in the source; assumed to be 1"
    yield f"temperature of the probabilities: {stated}; the logits are its product with their logarithm"
    if options.recipe is None:
        yield f"size and interpolation: not in the source; assumed to be {recipe.size} px and {recipe.interpolation}"
    yield "teacher, its weights and the range of its crops: not in the source"
    if kept is not None:
        yield (
            f"classes: the source keeps the {kept} largest of {num_classes:,} probabilities; the others share the rest "
            "evenly, and losses that depend on them are refused"
        )


def views_of_top(
    ids: np.ndarray,
    top: np.ndarray,
    num_classes: int,
    temperature: float,
    where: str,
    content: tuple[np.ndarray, ...],
    params: Mapping[str, np.ndarray],
    lost: Counter[str],
) -> ForeignViews:
    """Views with the largest probabilities `top` [views, n, k] of the classes `ids`."""
    lost += check_top(ids, top, num_classes, where)
    best = np.take_along_axis(ids, top.argmax(-1)[..., None], -1)[..., 0]

    def logits(view: int, rows: slice) -> np.ndarray:
        return logits_of_top(ids[view, rows], top[view, rows], num_classes, temperature)

    return ForeignViews((*content, ids, top), best, logits, params, lost)
