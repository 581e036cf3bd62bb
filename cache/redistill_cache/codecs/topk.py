"""Top-k: the k largest logits and two log-sum-exps. Only for importing logits that another format truncated.

The logits outside of the top k are unknown. Decoding gives them all one value, such that the log-sum-exp at T = 1 is
right. At other temperatures the distribution is wrong by the mass of the tail, which at T = 4 is most of it; losses
that depend on the tail are refused (`full_rows` is false).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.backend import Array, Backend, backend_of, to_numpy
from redistill_cache.codecs.protocol import Encoded
from redistill_cache.codecs.stats import check_finite, row_errors, top1_kept
from redistill_cache.spec import ArraySpec
from redistill_cache.strict_json import Fields, Json

__all__ = ["TopKCodec"]


@dataclass(frozen=True)
class TopKCodec:
    """`index` and `value` of the k largest logits in descending order; `lse_t1` and `lse_t4` of all."""

    width: int
    k: int
    name: str = "topk"

    full_rows = False
    keeps_shift = True

    @property
    def sparse(self) -> frozenset[str]:
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
        backend = backend_of(rows)
        rows = backend.cast(rows, "float32")
        index = backend.largest(rows, self.k)
        index = backend.take(index, backend.order(-backend.take(rows, index)))
        arrays = {
            "index": backend.cast(index, "int64"),
            "value": backend.take(rows, index),
            "lse_t1": backend.cast(log_sum_exp(backend, rows, 1.0), "float32"),
            "lse_t4": backend.cast(log_sum_exp(backend, rows, 4.0), "float32"),
        }
        decoded = self.decode(arrays)
        arrays["index"] = to_numpy(index).astype(self.arrays()[0].dtype)
        errors = row_errors(rows, decoded, "kl")
        return Encoded(arrays, errors, np.zeros(len(rows), bool), top1_kept(rows, decoded))

    def errors(self, exact: Array, decoded: Array) -> dict[str, np.ndarray]:
        return row_errors(exact, decoded, "kl")

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        value, lse = arrays["value"], arrays["lse_t1"]
        backend = backend_of(value)
        top = backend.cast(value, "float64")
        tail_mass = 1.0 - backend.exp(top - backend.cast(lse, "float64")[:, None]).sum(1)
        tail_classes = max(self.width - self.k, 1)
        tail = backend.cast(lse, "float64") + backend.log(backend.clip(tail_mass, 1e-12, None) / tail_classes)
        # Never above the smallest of the top k: rounding can leave more mass than the tail can hold.
        tail = backend.minimum(tail, top[:, -1])
        rows = backend.zeros((len(value), self.width), "float32") + backend.cast(tail, "float32")[:, None]
        index = arrays["index"]
        if isinstance(index, np.ndarray):
            index = backend.constant(index.astype(np.int64))
        return backend.put(rows, index, value)

    @classmethod
    def open(cls, width: int, config: Fields) -> TopKCodec:
        config.choice("tail", ("uniform",))
        return cls(width, config.integer("k", 1, width))


def log_sum_exp(backend: Backend, rows: Array, temperature: float) -> Array:
    """log(sum(exp(row / T))) of every row, float64."""
    scaled = backend.cast(rows, "float64") / temperature
    largest = backend.max_of_row(scaled)
    return (backend.log(backend.exp(scaled - largest).sum(1)[:, None]) + largest)[:, 0]
