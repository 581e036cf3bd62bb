"""Stage 1: run a teacher once over the views of an image set, into an archive.

Reading order: run, plan, pilot, estimate, open_archive, encoder. `rank_layers` is apart from these.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from redistill.caching.options import CacheOptions

if TYPE_CHECKING:
    from redistill.caching.run import CacheResult, cache_teacher, estimate_cache

__all__ = ["CacheOptions", "CacheResult", "cache_teacher", "estimate_cache"]


def __getattr__(name: str) -> object:
    """Names that need torch are loaded at first use: `redistill --help` reads the options only."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("redistill.caching.run"), name)
