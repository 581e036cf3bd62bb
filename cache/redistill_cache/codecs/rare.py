"""Arrays that hardly any row needs, as decode may be given them: whole, only the rows that need them, or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from redistill_cache.codecs.space import Array, Space
from redistill_cache.errors import Damaged

__all__ = ["rare_rows"]


def rare_rows(
    space: Space, arrays: Mapping[str, Array], name: str, flags: Array, flag: int
) -> tuple[Array | None, Array | None]:
    """(indices of the flagged rows, what `name` holds for them), or (None, None) where there are none.

    An array that is absent on the device means that no row needs it: looking would cost a synchronisation.
    """
    array = arrays.get(name)
    if array is None and not space.on_host:
        return None, None
    index = space.rows_where((flags & flag) != 0)
    if len(index) == 0:
        return None, None
    if array is None:
        raise Damaged(f"expected array {name!r} for {len(index)} rows that need it, found none")
    values = space.constant(array) if isinstance(array, np.ndarray) and space.torch is not None else array
    if len(values) == len(flags):
        return index, values[index]
    if len(values) == len(index):
        return index, values
    raise Damaged(f"expected {len(index)} or {len(flags)} rows of array {name!r}, found {len(values)}")
