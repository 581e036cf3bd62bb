"""float16 and float32: the plain codecs, exact enough for anything, and what the others are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.checks import Config, check_width
from redistill_cache.codecs.protocol import Encoded, Json, exact_rows, rare_rows
from redistill_cache.codecs.space import Array, space_of, to_numpy
from redistill_cache.codecs.stats import TEMPERATURES, check_finite, kl_rows, relative_error, rounded_up
from redistill_cache.errors import Damaged
from redistill_cache.spec import ArraySpec

__all__ = ["Float16Codec", "Float32Codec"]

EXACT = 1


@dataclass(frozen=True)
class Float32Codec:
    """Every value as it was."""

    width: int
    metric: str = "kl"
    name: str = "float32"

    full_rows = True
    tail_rule = ""

    @property
    def rare(self) -> frozenset[str]:
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
        none = np.zeros(len(rows))
        names = [f"kl_t{t:g}" for t in TEMPERATURES] if self.metric == "kl" else ["relative"]
        every = np.ones(len(rows), bool)
        values = space_of(rows).cast(rows, "float32")
        return Encoded({"values": values}, dict.fromkeys(names, none), every, every)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        return arrays["values"]

    @classmethod
    def open(cls, width: int, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> Float32Codec:
        return cls(check_width(width), _metric("float32", config, side))


@dataclass(frozen=True)
class Float16Codec:
    """Logits less their row maximum (features as they are) in float16; rows that miss the bound exactly.

    The largest value of a row becomes zero, so that float16 is finest where the probability is, whatever the offset.
    """

    width: int
    metric: str = "kl"
    fidelity: float = 1e-3
    keep_shift: bool = False
    name: str = "float16"

    full_rows = True
    tail_rule = ""

    @property
    def rare(self) -> frozenset[str]:
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
        space = space_of(rows)
        rows = space.cast(rows, "float32")
        shift = space.max_of_row(rows)[:, 0] if self.metric == "kl" else rows[:, 0] * 0.0
        moved = space.cast(rows, "float64") - space.cast(shift, "float64")[:, None]
        values = space.cast(space.clip(moved, -65504.0, 65504.0), "float16")
        arrays = {"values": values, "flags": space.zeros((len(rows),), "uint8")}
        if self.keep_shift:
            arrays["shift"] = shift
        decoded = self.decode(arrays)
        if self.metric == "kl":
            errors = {f"kl_t{t:g}": rounded_up(to_numpy(kl_rows(rows, decoded, t))) for t in TEMPERATURES}
        else:
            errors = {"relative": rounded_up(to_numpy(relative_error(rows, decoded)))}
        chosen = space.argmax_of_row(decoded)[:, None]
        kept = to_numpy((space.take(rows, chosen) == space.max_of_row(rows))[:, 0])
        exact = ~(np.max(list(errors.values()), axis=0) <= self.fidelity)
        arrays["flags"] = space.constant(exact.astype(np.uint8))
        arrays["exact"] = exact_rows(rows, exact)
        return Encoded(arrays, {name: np.where(exact, 0.0, e) for name, e in errors.items()}, exact, kept | exact)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        space = space_of(arrays["values"])
        rows = space.cast(arrays["values"], "float32")
        if "shift" in arrays:
            rows = rows + arrays["shift"][:, None]
        exact, values = rare_rows(space, arrays, "exact", arrays["flags"], EXACT)
        if exact is not None:
            rows[exact] = values
        return rows

    @classmethod
    def open(cls, width: int, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> Float16Codec:
        reader = Config("float16", config)
        metric = reader.choice("metric", ("kl", "relative"))
        codec = cls(check_width(width), metric, reader.number("fidelity", 1e-12, 1e3), reader.flag("keep_shift"))
        reader.done()
        _no_side("float16", side)
        return codec


def _metric(name: str, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> str:
    reader = Config(name, config)
    metric = reader.choice("metric", ("kl", "relative"))
    reader.done()
    _no_side(name, side)
    return metric


def _no_side(name: str, side: Mapping[str, np.ndarray]) -> None:
    if side:
        raise Damaged(f"expected no side data of codec {name}, found {', '.join(sorted(side)[:5])}")
