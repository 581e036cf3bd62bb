"""Processes started by torchrun: `Rank` is the position of this one, `World` the process group for training.

Training needs both. Stage 1 needs no process group, because its ranks communicate through the archive: rank 0 creates
it and declares the teacher; then every rank writes its own share of the blocks and, when that is done, blocks of other
ranks that are still missing. If two ranks compute the same block, the first commit counts, and the bytes are the same
anyway. So ranks may die, and a resumed run may have more or fewer of them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
# How often a rank shows that it lives, and for how long it may fail to.
BEAT_SECONDS, SILENT = 1.0, 45.0
DONE, FAILED = b"done", b"failed"
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
    heartbeat: Heartbeat | None = None

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


class Heartbeat(threading.Thread):
    """Tells the other ranks every second that this one lives, and notices when one of them does not.

    A rank that waits for a GPU does not notice that another one died: NCCL would let it wait for ten minutes. So the
    communication of the GPU is aborted, which raises an error in the thread that waits.
    """

    def __init__(self, rank: Rank, device: torch.device) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.device = rank, device
        self.lost = threading.Event()
        """Another rank has died, or left with an error."""
        self._end = threading.Event()
        # A connection of its own: a call that waits, in another thread, would keep the one of the process group busy.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        server = dist.TCPStore(address, port, timeout=timedelta(seconds=SILENT))  # type: ignore[attr-defined]
        self._store = dist.PrefixStore("heartbeat", server)  # type: ignore[attr-defined]
        self._store.set(str(rank.rank), "0")

    def run(self) -> None:
        others = [str(rank) for rank in range(self.rank.world_size) if rank != self.rank.rank]
        last, since = [b""] * len(others), [time.monotonic()] * len(others)
        beats = 0
        while not self._end.wait(BEAT_SECONDS):
            beats += 1
            try:
                self._store.set(str(self.rank.rank), str(beats))
                now = self._store.multi_get(others)
            except RuntimeError:  # the rank that holds the store is gone
                now = [FAILED] * len(others)
            for i, (old, new) in enumerate(zip(last, now, strict=True)):
                since[i] = since[i] if old == new else time.monotonic()
            last = now
            silent = (time.monotonic() - at > SILENT for word, at in zip(now, since, strict=True) if word != DONE)
            if FAILED in now or any(silent):
                self.lost.set()
                self.abort()
                return

    def leave(self, *, failed: bool) -> None:
        """Tell the others that this rank has ended."""
        self._end.set()
        self.join(SILENT)
        with suppress(RuntimeError):
            self._store.set(str(self.rank.rank), (FAILED if failed else DONE).decode())
        if failed:
            self.abort()

    def abort(self) -> None:
        """End what the GPU communicates. To destroy the process group instead could wait for the other ranks."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):
                world: Any = dist.group.WORLD
                world._get_backend(self.device).abort()


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """The world of this process, with a process group when torchrun started it."""
    rank = Rank.from_environment()
    rank_device = pick_device(device, local_rank=rank.local_rank)
    if rank.world_size == 1:
        yield World(rank, rank_device)
        return
    if rank_device.type == "cuda":
        # On an error, abort what the GPU waits for; do not abort the process, which could not say why.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        try:
            dist.init_process_group("nccl", device_id=rank_device)
        except RuntimeError as error:
            if "Duplicate GPU" not in str(error):
                raise
            raise Refused(
                f"two processes would use the same GPU, one of them {rank_device}; start one process for each GPU"
            ) from error
    else:
        dist.init_process_group("gloo")
    control: Any = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    heartbeat = Heartbeat(rank, rank_device)
    heartbeat.start()
    try:
        yield World(rank, rank_device, control, heartbeat)
    except BaseException as error:
        heartbeat.leave(failed=True)
        if isinstance(error, RuntimeError) and (heartbeat.lost.is_set() or "by peer" in str(error)):
            raise Refused(RANK_EXITED) from error
        raise
    heartbeat.leave(failed=False)
    dist.destroy_process_group()
