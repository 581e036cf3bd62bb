"""What is expensive to find out about a user's files is kept in the user's cache folder, as .npz.

A cache that cannot be read is as good as none, and one that cannot be written costs the time it would have saved.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from redistill_cache.files import LOCAL

__all__ = ["keep", "settled", "take_up"]

# An edit within this time of another may carry the same modification time.
RACY_NS = 2_000_000_000
# What reading a damaged .npz raises: zipfile has many words for it.
NPZ_RAISES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def settled(stamps: np.ndarray, started_ns: int) -> np.ndarray:
    """For stamps [n, 2] (size, modification time; -1 unknown): whether a later edit would have to change them."""
    quiet: np.ndarray = (stamps[:, 1] < started_ns - RACY_NS) & (stamps[:, 0] >= 0)
    return quiet


def take_up(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """The arrays that were kept under these names; None if any is not there."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in names}
    except NPZ_RAISES:
        return None


def keep(path: Path, **arrays: np.ndarray) -> None:
    """Publish the arrays for `take_up`."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    with contextlib.suppress(OSError):
        LOCAL.make_directories(path.parent)
        LOCAL.publish(path, out.getbuffer())
