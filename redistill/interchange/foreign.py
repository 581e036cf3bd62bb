"""What the importer needs of another format. A layout is one module with a class that has these members.

The importer joins the names of the records to the images, reads records block by block, twice (once to check all of
them and to count what they lost, once to write), and stores logits and view parameters through the ordinary writer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from redistill_cache.keys import PackedKeys

from redistill.views.recipe import Recipe

__all__ = ["Foreign", "ForeignViews"]


@dataclass(frozen=True)
class ForeignViews:
    """Some views of some records, checked."""

    content: tuple[np.ndarray, ...]
    """[views, n, ...]: what was read of them; hashed, so that a resumed import has the same source."""
    top1: np.ndarray
    """[views, n]: the class with the largest logit."""
    logits: Callable[[int, slice], np.ndarray]
    """(position of the view, rows) -> float32 [n, C]."""
    params: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[views, n, ...] of each array of the recipe; empty where the recipe has no choice, as for central crops."""
    lost: Counter[str] = field(default_factory=Counter)
    """How often the source lost something, by what it is."""


class Foreign(Protocol):
    """An opened source of another format: records by name, each with the same number of views."""

    @property
    def names(self) -> PackedKeys:
        """The name of every record, in order; one may occur again."""

    @property
    def num_views(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def kept(self) -> int | None:
        """How many of the largest probabilities the source has; None if it has all classes."""

    @property
    def view_bytes(self) -> int:
        """Memory that one view of one record takes while it is read."""

    @property
    def recipe(self) -> Recipe:
        """The views, as far as they are the same for all records."""

    @property
    def description(self) -> Mapping[str, Any]:
        """The program, its layout and settings, for the archive: plain JSON without paths."""

    @property
    def audit(self) -> tuple[str, ...]:
        """What any source of this kind does not say or has lost, and what is assumed instead: a sentence each."""

    def names_of(self, keys: PackedKeys) -> Iterable[str]:
        """How the source names the images with these keys, all images of the data in order."""

    def read(self, records: np.ndarray, views: range, sizes: np.ndarray) -> ForeignViews:
        """These views of these records; `sizes` [n, 2] are height and width of their images. Refuses what is wrong."""
