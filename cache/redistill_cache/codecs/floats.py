"""float16 and float32: the plain codecs, which need no pilot; the others are compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.backend import Array, backend_of
from redistill_cache.codecs.protocol import Encoded, exact_rows, sparse_rows
from redistill_cache.codecs.stats import check_finite, error_names, rounded_up, row_errors, top1_kept
from redistill_cache.spec import ArraySpec
from redistill_cache.strict_json import Fields, Json

__all__ = ["Float16Codec", "Float32Codec"]

EXACT = 1
METRICS = ("kl", "relative")


@dataclass(frozen=True)
class Float32Codec:
    """Every value, unchanged."""

    width: int
    metric: str = "kl"
    name: str = "float32"

    full_rows = True
    keeps_shift = True

    @property
    def sparse(self) -> frozenset[str]:
        return frozenset()

    def config(self) -> dict[str, Json]:
        return {"metric": self.metric}

    def side(self) -> dict[str, np.ndarray]:
        return {}

    def arrays(self) -> tuple[ArraySpec, ...]:
        return (ArraySpec("values", "float32", (self.width,)),)

    def rows_needing(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {}

    def encode(self, rows: Array) -> Encoded:
        check_finite(rows)
        every = np.ones(len(rows), bool)
        values = backend_of(rows).cast(rows, "float32")
        return Encoded({"values": values}, dict.fromkeys(error_names(self.metric), np.zeros(len(rows))), every, every)

    def errors(self, exact: Array, decoded: Array) -> dict[str, np.ndarray]:
        return row_errors(exact, decoded, self.metric)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        return arrays["values"]

    @classmethod
    def open(cls, width: int, config: Fields) -> Float32Codec:
        return cls(width, config.choice("metric", METRICS))


@dataclass(frozen=True)
class Float16Codec:
    """Logits less their row maximum (features as they are) in float16; rows that miss the bound in float32.

    The largest value of a row becomes zero, so that float16 is most precise where the probability is, for any offset.
    """

    width: int
    metric: str = "kl"
    fidelity: float = 1e-3
    keep_shift: bool = False
    name: str = "float16"

    full_rows = True

    @property
    def keeps_shift(self) -> bool:
        return self.keep_shift or self.metric != "kl"

    @property
    def sparse(self) -> frozenset[str]:
        return frozenset({"exact"})

    def config(self) -> dict[str, Json]:
        return {"metric": self.metric, "fidelity": self.fidelity, "keep_shift": self.keep_shift}

    def side(self) -> dict[str, np.ndarray]:
        return {}

    def arrays(self) -> tuple[ArraySpec, ...]:
        shift = (ArraySpec("shift", "float32"),) if self.keep_shift else ()
        return (
            ArraySpec("values", "float16", (self.width,)),
            ArraySpec("flags", "uint8"),
            *shift,
            ArraySpec("exact", "float32", (self.width,)),
        )

    def rows_needing(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"exact": (arrays["flags"] & EXACT) != 0}

    def encode(self, rows: Array) -> Encoded:
        check_finite(rows)
        backend = backend_of(rows)
        rows = backend.cast(rows, "float32")
        shift = backend.max_of_row(rows)[:, 0] if self.metric == "kl" else rows[:, 0] * 0.0
        shifted = backend.cast(rows, "float64") - backend.cast(shift, "float64")[:, None]
        values = backend.cast(backend.clip(shifted, -65504.0, 65504.0), "float16")
        arrays = {"values": values, "flags": backend.zeros((len(rows),), "uint8")}
        if self.keep_shift:
            arrays["shift"] = shift
        decoded = self.decode(arrays)
        errors = rounded_up(row_errors(rows, decoded, self.metric))
        exact = ~(np.max(list(errors.values()), axis=0) <= self.fidelity)
        arrays["flags"] = backend.constant(exact.astype(np.uint8))
        arrays["exact"] = exact_rows(rows, exact)
        errors = {name: np.where(exact, 0.0, values) for name, values in errors.items()}
        return Encoded(arrays, errors, exact, top1_kept(rows, decoded) | exact)

    def errors(self, exact: Array, decoded: Array) -> dict[str, np.ndarray]:
        return row_errors(exact, decoded, self.metric)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        backend = backend_of(arrays["values"])
        rows = backend.cast(arrays["values"], "float32")
        if "shift" in arrays:
            rows = rows + arrays["shift"][:, None]
        exact, values = sparse_rows(backend, arrays, "exact", arrays["flags"], EXACT)
        if exact is not None:
            rows[exact] = values
        return rows

    @classmethod
    def open(cls, width: int, config: Fields) -> Float16Codec:
        metric = config.choice("metric", METRICS)
        return cls(width, metric, config.number("fidelity", 1e-12, 1e3), config.flag("keep_shift"))
