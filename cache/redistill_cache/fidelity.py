"""What the codecs lost, merged over blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redistill_cache.codecs.stats import BlockStats
from redistill_cache.errors import Damaged
from redistill_cache.spec import TeacherSpec
from redistill_cache.strict_json import Json

__all__ = ["merge_stats", "summarise"]


def merge_stats(teacher: TeacherSpec, stats: Sequence[Mapping[str, Json] | None]) -> dict[str, Json]:
    """Per signal, the statistics of all blocks together; nothing for a signal that some block did not measure."""
    merged: dict[str, Json] = {}
    for signal in teacher.signals:
        parts = [item[signal.name] for item in stats if item is not None and signal.name in item]
        if parts and len(parts) == len(stats):
            try:
                merged[signal.name] = BlockStats.merge(BlockStats.from_json(part) for part in parts).to_json()
            except OverflowError:
                raise Damaged(f"fidelity statistics of signal {signal.name!r}: errors add up to infinity") from None
    return merged


def summarise(stats: Json) -> dict[str, float]:
    """The figures a reader of `inspect` wants."""
    try:
        return BlockStats.from_json(stats).summary()
    except Damaged as error:
        raise Damaged(f"fidelity statistics of the manifest: {error}") from None
