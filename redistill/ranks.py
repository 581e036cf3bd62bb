"""Several processes under torchrun: which this is; and in stage 1, who creates, who waits, and which blocks are whose.

Stage 1 has no communication but the archive. Rank 0 creates it and declares the teacher; every rank then writes its own
share and, when it is through, what others have not written yet. A block that two ranks made is committed by the first
and is the same anyway. So ranks may die, and come back as more or fewer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn

from redistill.devices import pick_device
from redistill.interrupts import StopRequest

__all__ = ["Rank", "World", "joined_world"]

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


# -- distributed ------------------------------------------------------------------------------------------------------
#
# Several processes under torchrun: what each is, and how they agree.

Thing = TypeVar("Thing")

# One process of a machine may read a million images before the first step while the others wait for it. A process that
# has died is noticed at once, by torchrun and by gloo.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """This process, its device, and all the others."""

    rank: Rank
    device: torch.device
    control: dist.ProcessGroup | None = None
    """For words between processes, apart from gradients: over gloo, so that no GPU waits for them."""

    @property
    def size(self) -> int:
        return self.rank.world

    @property
    def first(self) -> bool:
        return self.rank.first

    def wrap(self, module: nn.Module, sync_bn: bool) -> nn.Module:
        """The module as it is trained: gradients are averaged over processes in backward."""
        if self.size == 1:
            return module
        if sync_bn:
            if self.device.type != "cuda":
                raise UsageError("--sync-bn needs GPUs: torch has it for CUDA only")
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def any(self, *mine: bool) -> list[bool]:
        """For each question, whether it is so for any process; all of them must ask at the same point."""
        if self.size == 1:
            return list(mine)
        flags = torch.tensor([float(flag) for flag in mine])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in flags]

    def gather(self, mine: Thing) -> list[Thing]:
        """What every process has, in the order of ranks."""
        if self.size == 1:
            return [mine]
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, mine, group=self.control)
        return everybody

    def as_first_has(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values that the first one has."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    @contextmanager
    def first_here_first(self) -> Iterator[None]:
        """One process of each machine does the block before the others: what it reads and keeps, they find."""
        if self.rank.local:
            self.wait()
        try:
            yield
        finally:
            if not self.rank.local:
                self.wait()


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """The world of this process, joined as torchrun describes it; alone without torchrun."""
    rank = Rank.from_environment()
    picked = pick_device(device, local_rank=rank.local)
    if rank.world == 1:
        yield World(rank, picked)
        return
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
        dist.init_process_group("nccl", device_id=picked)
    else:
        dist.init_process_group("gloo")
    try:
        control: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(rank, picked, control)
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise Refused(
            "another rank exited; see its error above, then run the same command again to resume from the checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()
