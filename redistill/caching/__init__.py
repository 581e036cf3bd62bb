"""Stage 1: run a teacher once over the views of an image set, into an archive.

Reading order: run, plan, pilot, estimate, open_archive, encoder.
"""

from __future__ import annotations

from redistill.caching.options import CacheOptions
from redistill.caching.run import CacheResult, cache_teacher, estimate_cache

__all__ = ["CacheOptions", "CacheResult", "cache_teacher", "estimate_cache"]
