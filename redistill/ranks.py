"""Processes started by torchrun: `Rank` is the position of this one, `World` the process group for training.

Training needs both. Stage 1 needs no process group, because its ranks communicate through the archive: rank 0 creates
it and declares the teacher; then every rank writes its own share of the blocks and, when that is done, blocks of other
ranks that are still missing. If two ranks compute the same block, the first commit counts, and the bytes are the same
anyway. So ranks may die, and a resumed run may have more or fewer of them.
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

__all__ = ["RANK_EXITED", "Rank", "World", "joined_world"]

POLL_SECONDS = 0.25
# Rank 0 may index a million images before the first step, while the others wait. This timeout need not detect a dead
# process: torchrun and gloo notice that at once.
CONTROL_TIMEOUT = timedelta(hours=24)

RANK_EXITED = "another rank exited; see its error above, then run the same command again to resume from the checkpoint"

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process among all processes, and among those on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Rank:
        """From the variables set by torchrun; a single process without them."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        texts = [os.environ.get(name) for name in names]
        if texts[0] is None or texts[1] is None:
            return cls()
        try:
            rank, world_size = int(texts[0]), int(texts[1])
            local_rank, local_world_size = int(texts[2] or 0), int(texts[3] or 1)
        except ValueError:
            raise UsageError(f"expected numbers in {', '.join(names)}, found {texts}; start with torchrun") from None
        if not (0 <= rank < world_size and 0 <= local_rank < local_world_size):
            raise UsageError(f"expected a rank below its world size in {', '.join(names)}, found {texts}")
        return cls(rank, world_size, local_rank, local_world_size)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def work_order(self, blocks: Sequence[T]) -> list[T]:
        """This rank's share of the blocks, then the shares of the next ranks, each of those backwards."""
        shares = [list(blocks[rank :: self.world_size]) for rank in range(self.world_size)]
        others = shares[self.rank + 1 :] + shares[: self.rank]
        return shares[self.rank] + [block for share in others for block in reversed(share)]

    def wait_until(self, condition: Callable[[], bool], stop: StopRequest) -> None:
        """Wait for rank 0 to finish some work. torchrun ends this process if rank 0 fails."""
        while not condition():
            stop.raise_if_set()
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class World:
    """This process, its device, and the process group it trains in. With one process, nothing is communicated."""

    rank: Rank
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A gloo group for everything but gradients, so that no GPU is synchronised for it."""

    @property
    def size(self) -> int:
        return self.rank.world_size

    @property
    def first(self) -> bool:
        return self.rank.first

    def synchronise_norms(self, module: nn.Module) -> nn.Module:
        """The module with batch norms whose statistics are those of all ranks."""
        if self.size == 1:
            return module
        if self.device.type != "cuda":
            raise UsageError("--sync-bn needs GPUs: torch implements it for CUDA only")
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-any-return, no-untyped-call]

    def wrap(self, module: nn.Module, *, unused: bool = False) -> nn.Module:
        """The module for training: backward averages its gradients over all ranks.

        `unused` says that the loss may not depend on all parameters.
        """
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)

    # The following are collective: all ranks must call them in the same order.

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(value) for value in values]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """One rank of each machine runs the block before the others, which then find its results cached on disk."""
        if self.rank.local_rank:
            self.barrier()
        try:
            yield
        finally:
            if not self.rank.local_rank:
                self.barrier()


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """The world of this process, with a process group when torchrun started it."""
    rank = Rank.from_environment()
    rank_device = pick_device(device, local_rank=rank.local_rank)
    if rank.world_size == 1:
        yield World(rank, rank_device)
        return
    if rank_device.type == "cuda":
        torch.cuda.set_device(rank_device)
        dist.init_process_group("nccl", device_id=rank_device)
    else:
        dist.init_process_group("gloo")
    try:
        control: Any = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        yield World(rank, rank_device, control)
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise Refused(RANK_EXITED) from error
    finally:
        dist.destroy_process_group()
