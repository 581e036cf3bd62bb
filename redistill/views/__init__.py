"""Views: recipes, drawn parameters, rendered pixels, and the canaries that prove alignment."""

from __future__ import annotations

from redistill.views.dataset import MixedView, RenderedView, ViewDataset, render
from redistill.views.draw import draw_params
from redistill.views.recipe import Recipe
from redistill.views.recipe_spec import parse_recipe
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
    "render",
    "render_view",
    "render_views",
    "usable_rows",
]
