"""Views: recipes as data, parameters drawn by a counter, pixels, and the proof that two labs see the same."""

from __future__ import annotations

from redistill.views.draw import draw_params
from redistill.views.named import parse_recipe
from redistill.views.recipe import Recipe
from redistill.views.render import render_view, render_views

__all__ = ["Recipe", "draw_params", "parse_recipe", "render_view", "render_views"]
