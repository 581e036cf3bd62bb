"""What an archive claims, held against the bytes that are really there: kilobytes must not become gigabytes.

Writers keep the same bounds (`UsageError`), so no honest archive meets them in a reader.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from redistill_cache import layout, limits
from redistill_cache.errors import Refused, UsageError
from redistill_cache.spec import ArchiveSpec, TeacherSpec
from redistill_cache.wording import human_bytes

__all__ = ["check_digests", "check_keys", "check_side", "require_memory"]

SizeOf = Callable[[str], int]  # of a file of the archive


def check_digests(spec: ArchiveSpec, size_of: SizeOf) -> None:
    """Digests are stored as they are, so the number of samples is no larger than what their file can hold."""
    digests = layout.sample_arrays(spec, 1)["digest"]
    found = size_of(digests.shard_path(0, 0))
    if found != digests.stored_bytes:
        raise UsageError(
            f"the digests of {spec.num_samples} samples take {digests.stored_bytes} bytes, found {found}; "
            "the number of samples is wrong"
        )


def check_keys(spec: ArchiveSpec, total: int, stored: int) -> None:
    """`total` bytes of keys that lie in `stored` bytes."""
    most = min(spec.num_samples * limits.MAX_KEY_BYTES, limits.KEY_SLACK + limits.KEY_RATIO * stored)
    if not 1 <= total <= most:
        raise UsageError(
            f"keys of {spec.num_samples} samples, stored in {stored} bytes, may take 1 to {most} bytes, found {total}"
        )


def check_side(teacher: TeacherSpec, size_of: SizeOf) -> None:
    """The side data of every signal, given the sizes of its files."""
    shards = {name: array.shard_path(0, 0) for name, array in layout.side_arrays(teacher).items()}
    for signal in teacher.signals:
        total = sum(side.nbytes for side in signal.side)
        stored = sum(size_of(shards[f"{signal.name}/{side.name}"]) for side in signal.side)
        most = limits.SIDE_SLACK + limits.SIDE_RATIO * stored
        if total > most:
            raise UsageError(
                f"side data of signal {signal.name!r}, stored in {stored} bytes, may take {most} bytes, found {total}"
            )


def require_memory(nbytes: int, what: str) -> None:
    """`Refused` when something takes more memory than the machine has: said now, not by the kernel later."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > have:
        raise Refused(f"{what} takes {human_bytes(nbytes)} of memory, this machine has {human_bytes(have)}")
