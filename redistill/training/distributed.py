"""Several processes under torchrun: what each is, and how they agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from redistill_cache.errors import UsageError
from torch import nn

from redistill.caching.ranks import Rank
from redistill.devices import pick_device

__all__ = ["World", "joined_world"]

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class World:
    """This process, its device, and all the others."""

    rank: Rank
    device: torch.device

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

    def any(self, mine: bool) -> bool:
        """Whether it is so for any process; all of them must ask at the same point."""
        if self.size == 1:
            return mine
        flag = torch.tensor([float(mine)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def gather(self, mine: Thing) -> list[Thing]:
        """What every process has, in the order of ranks."""
        if self.size == 1:
            return [mine]
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, mine)
        return everybody

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """The world of this process, joined as torchrun describes it; alone without torchrun."""
    rank = Rank.from_environment()
    world = World(rank, pick_device(device, local_rank=rank.local))
    if rank.world == 1:
        yield world
        return
    dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()
