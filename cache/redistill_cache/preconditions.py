"""What a writer checks before it writes: the declared arrays, unique keys, the specification it started with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from redistill_cache import limits
from redistill_cache.errors import Damaged, SpecMismatch, UsageError
from redistill_cache.journal import Record, parse_record
from redistill_cache.keys import PackedKeys
from redistill_cache.layout import ArrayLayout
from redistill_cache.strict_json import Json, canonical

__all__ = ["check_array", "check_keys", "check_names", "check_record", "refuse_difference"]


def refuse_difference(stored: Json, given: Json, where: str, free: Sequence[str] = ()) -> None:
    """`SpecMismatch` naming the first field that differs; the fields in `free` may."""
    difference = _first_difference(
        {key: value for key, value in stored.items() if key not in free},
        {key: value for key, value in given.items() if key not in free},
        "",
    )
    if difference:
        field, old, new = difference
        hint = "use extend_views (--extend-views)" if field == "num_views" else "use the same setting"
        raise SpecMismatch(
            f"{where} was started with {field} = {_show(old)}, now it is {_show(new)}; {hint}, or start a new archive"
        )


def _show(value: Json) -> str:
    return ascii(value)[:80]


def _first_difference(old: Json, new: Json, path: str) -> tuple[str, Json, Json] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{path}.{key}" if path else key, old.get(key), new.get(key)) for key in sorted(old.keys() | new)]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:  # canonical bytes, because 1, 1.0 and true are equal to Python and different JSON
        return None if canonical(old) == canonical(new) else (path, old, new)
    found = (_first_difference(a, b, where) for where, a, b in pairs)
    return next((item for item in found if item), None)


def check_names(arrays: Mapping[str, np.ndarray], layouts: Mapping[str, ArrayLayout], what: str) -> None:
    if set(arrays) != set(layouts):
        missing, unknown = sorted(set(layouts) - set(arrays)), sorted(set(arrays) - set(layouts))
        raise UsageError(f"{what}: arrays missing: {missing or 'none'}, arrays unknown: {unknown or 'none'}")


def check_array(name: str, array: np.ndarray, expected: ArrayLayout, rows: int) -> None:
    shape = (rows, *expected.row_shape)
    if array.dtype != np.dtype(expected.dtype) or array.shape != shape:
        raise UsageError(
            f"array {name!r} must be {expected.dtype} {list(shape)}, found {array.dtype} {list(array.shape)}"
        )


def check_keys(keys: PackedKeys) -> None:
    lengths = keys.lengths()
    if not len(keys) or int(lengths.min()) < 1 or int(lengths.max()) > limits.MAX_KEY_BYTES:
        raise UsageError(f"every sample needs a key of 1 to {limits.MAX_KEY_BYTES} bytes")
    if len(np.unique(keys.hashes())) == len(keys):
        return
    seen: set[str] = set()
    for key in keys:  # rare: name the culprit
        if key in seen:
            raise UsageError(f"two samples have the key {key!r}; keys must be unique")
        seen.add(key)


def check_record(record: Record) -> None:
    """A record that would be refused when it is read must not be written."""
    data = record.to_bytes()
    try:
        parse_record(data, record.block, record.identity, "the record")
    except Damaged as error:
        raise UsageError(f"{record.block} cannot be committed with these stats: {error}; pass smaller ones") from None
