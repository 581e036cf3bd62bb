"""Top-k: the k largest logits and two log-sum-exps. Only for what other formats already truncated.

What is outside the k is not known. Decoding gives all of it one value, such that the log-sum-exp at T = 1 comes out
right (`tail_rule`); at other temperatures the distribution is wrong by the mass of the tail, which at T = 4 is most of
it, and losses that look at the tail must not be trained on it unasked (`full_rows` is false).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.checks import Config, check_width
from redistill_cache.codecs.protocol import Encoded, Json
from redistill_cache.codecs.space import Array, Space, space_of, to_numpy
from redistill_cache.codecs.stats import TEMPERATURES, check_finite, kl_rows
from redistill_cache.errors import Damaged
from redistill_cache.spec import ArraySpec

__all__ = ["TopKCodec"]


@dataclass(frozen=True)
class TopKCodec:
    """`index` and `value` of the k largest, largest first; `lse_t1` and `lse_t4` of all. NaN where not known."""

    width: int
    k: int
    name: str = "topk"

    full_rows = False
    tail_rule = "every class outside the top k gets one value, such that the log-sum-exp at T = 1 is right"

    @property
    def rare(self) -> frozenset[str]:
        return frozenset()

    def config(self) -> dict[str, Json]:
        return {"k": self.k, "tail": "uniform"}

    def side(self) -> dict[str, np.ndarray]:
        return {}

    def arrays(self) -> tuple[ArraySpec, ...]:
        index = "uint16" if self.width <= 1 << 16 else "uint32"
        return (
            ArraySpec("index", index, (self.k,)),
            ArraySpec("value", "float32", (self.k,)),
            ArraySpec("lse_t1", "float32"),
            ArraySpec("lse_t4", "float32"),
        )

    def rows_needing(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {}

    def encode(self, rows: Array) -> Encoded:
        check_finite(rows)
        space = space_of(rows)
        rows = space.cast(rows, "float32")
        index = space.largest(rows, self.k)
        index = space.take(index, space.order(-space.take(rows, index)))
        arrays = {
            "index": space.cast(index, "int64"),
            "value": space.take(rows, index),
            "lse_t1": space.cast(log_sum_exp(space, rows, 1.0), "float32"),
            "lse_t4": space.cast(log_sum_exp(space, rows, 4.0), "float32"),
        }
        decoded = self.decode(arrays)
        errors = {f"kl_t{t:g}": np.array(to_numpy(kl_rows(rows, decoded, t))) for t in TEMPERATURES}
        best = space.argmax_of_row(decoded)[:, None]
        kept = to_numpy((space.take(rows, best) == space.max_of_row(rows))[:, 0])
        arrays["index"] = to_numpy(index).astype(self.arrays()[0].dtype)
        return Encoded(arrays, errors, np.zeros(len(rows), bool), kept)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        value, lse = arrays["value"], arrays["lse_t1"]
        space = space_of(value)
        top = space.cast(value, "float64")
        left = 1.0 - space.exp(top - space.cast(lse, "float64")[:, None]).sum(1)
        # Never above the smallest value that was kept: rounding can leave more mass than the tail can hold.
        tail = space.cast(lse, "float64") + space.log(space.clip(left, 1e-12, None) / max(self.width - self.k, 1))
        tail = space.minimum(tail, top[:, -1])
        rows = space.zeros((len(value), self.width), "float32") + space.cast(tail, "float32")[:, None]
        index = arrays["index"]
        if isinstance(index, np.ndarray):
            index = space.constant(index.astype(np.int64))
        return space.put(rows, index, value)

    @classmethod
    def open(cls, width: int, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> TopKCodec:
        """From an archive: everything is checked."""
        reader = Config("topk", config)
        check_width(width)
        codec = cls(width, reader.integer("k", 1, width))
        reader.choice("tail", ("uniform",))
        reader.done()
        if side:
            raise Damaged(f"expected no side data of codec topk, found {', '.join(sorted(side)[:5])}")
        return codec


def log_sum_exp(space: Space, rows: Array, temperature: float) -> Array:
    """In float64."""
    scaled = space.cast(rows, "float64") / temperature
    largest = space.max_of_row(scaled)
    return (space.log(space.exp(scaled - largest).sum(1)[:, None]) + largest)[:, 0]
