"""The part of an opened archive that views use, in memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from redistill_cache.keys import pack_keys

from redistill.sources.index import SourceIndex
from redistill.views import draw_params, parse_recipe


class MemoryArchive:
    """View parameters drawn from a recipe for the samples of an index. Tests may change `spec` and `params`."""

    class_names = None

    def __init__(self, recipe_text: str, index: SourceIndex, *, seed: int, num_views: int) -> None:
        recipe = parse_recipe(recipe_text)
        self.num_samples, self.num_views = len(index.keys), num_views
        self.spec = SimpleNamespace(
            recipe=recipe.to_json(), view_arrays=recipe.arrays(), environment={}, excluded=(), canaries_per_view=0
        )
        self.keys, self.labels, self.digests = pack_keys(index.keys), index.labels, index.digests
        rows = np.arange(self.num_samples)
        self.params = [draw_params(recipe, seed, view, rows, index.sizes, len(rows)) for view in range(num_views)]

    def view_params(self, view: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        params = self.params[view]
        return params if rows is None else {name: values[rows] for name, values in params.items()}
