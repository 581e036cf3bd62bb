"""Views: recipes, drawn parameters, rendered pixels, and the canaries that prove alignment."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from redistill.views.recipe import Recipe
from redistill.views.recipe_spec import parse_recipe, recipe_text

if TYPE_CHECKING:
    from redistill.views.dataset import MixedView, RenderedView, ViewDataset
    from redistill.views.draw import draw_params
    from redistill.views.render import render_view, render_views
    from redistill.views.view_params import ArchiveViews, DrawnViews, Views, archive_recipe, join_archive, usable_rows

__all__ = [
    "ArchiveViews",
    "DrawnViews",
    "MixedView",
    "Recipe",
    "RenderedView",
    "ViewDataset",
    "Views",
    "archive_recipe",
    "draw_params",
    "join_archive",
    "parse_recipe",
    "recipe_text",
    "render_view",
    "render_views",
    "usable_rows",
]

# Loaded at first use: these need torch, and a recipe can be parsed and printed without it.
LAZY = {
    **dict.fromkeys(("MixedView", "RenderedView", "ViewDataset"), "dataset"),
    "draw_params": "draw",
    **dict.fromkeys(("render_view", "render_views"), "render"),
    **dict.fromkeys(
        ("ArchiveViews", "DrawnViews", "Views", "archive_recipe", "join_archive", "usable_rows"), "view_params"
    ),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  whatever the name stands for
    if name not in LAZY:
        raise AttributeError(f"module 'redistill.views' has no attribute {name!r}")
    return getattr(import_module(f"redistill.views.{LAZY[name]}"), name)
