"""Several processes under torchrun: which this is; and in stage 1, who creates, who waits, and which blocks are whose.

Stage 1 has no communication but the archive. Rank 0 creates it and declares the teacher; every rank then writes its own
share and, when it is through, what others have not written yet. A block that two ranks made is committed by the first
and is the same anyway. So ranks may die, and come back as more or fewer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from redistill_cache.errors import UsageError

from redistill.interrupts import StopRequest

__all__ = ["Rank"]

POLL_SECONDS = 0.25

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process among all, and among those of this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Rank:
        """As torchrun says; alone where nobody says anything."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        texts = [os.environ.get(name) for name in names]
        if texts[0] is None or texts[1] is None:
            return cls()
        try:
            rank, world = int(texts[0]), int(texts[1])
            local, local_world = int(texts[2] or 0), int(texts[3] or 1)
        except ValueError:
            raise UsageError(f"expected numbers in {', '.join(names)}, found {texts}; start with torchrun") from None
        if not (0 <= rank < world and 0 <= local < local_world):
            raise UsageError(f"expected a rank below its world size in {', '.join(names)}, found {texts}")
        return cls(rank, world, local, local_world)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def order(self, blocks: Sequence[T]) -> list[T]:
        """This rank's share of what is to be done, then the shares of the next ranks, each from its far end."""
        shares = [list(blocks[rank :: self.world]) for rank in range(self.world)]
        after = [block for share in shares[self.rank + 1 :] + shares[: self.rank] for block in reversed(share)]
        return shares[self.rank] + after

    def wait_until(self, done: Callable[[], bool], stop: StopRequest) -> None:
        """Until the first rank has done it. torchrun ends this process when that one fails."""
        while not done():
            stop.raise_if_set()
            time.sleep(POLL_SECONDS)
