"""Stage 1: a teacher once over the views of an image set, into an archive."""

from __future__ import annotations

from redistill.caching.options import CacheOptions
from redistill.caching.run import CacheResult, cache_teacher, estimate_cache

__all__ = ["CacheOptions", "CacheResult", "cache_teacher", "estimate_cache"]
