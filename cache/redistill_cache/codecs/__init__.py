"""Codecs: rows of a signal to small integer arrays and back, with a certified bound on the error of every row."""

from __future__ import annotations

from redistill_cache.codecs.catalogue import CodecOptions, explain_codec, fit_codec, open_codec
from redistill_cache.codecs.protocol import Codec, Encoded, join_encoded
from redistill_cache.codecs.stats import BlockStats, NotFinite, kl_rows
from redistill_cache.spec import CODECS

__all__ = [
    "CODECS",
    "BlockStats",
    "Codec",
    "CodecOptions",
    "Encoded",
    "NotFinite",
    "explain_codec",
    "fit_codec",
    "join_encoded",
    "kl_rows",
    "open_codec",
]
