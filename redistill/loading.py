"""Batches of a dataset from worker processes, the same way for both stages."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import torch

__all__ = ["batch_loader", "default_workers"]

MOST_WORKERS = 16
PREFETCH = 4


def default_workers(processes_here: int = 1) -> int:
    """Worker processes for one of `processes_here` training processes on this machine."""
    return max(1, min(len(os.sched_getaffinity(0)) // processes_here, MOST_WORKERS))


def worker_context() -> BaseContext:
    """Workers are forked from a small server that has torch imported and no threads.

    Forking this process instead would copy the locks of its threads; spawning would import torch for every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["redistill.views.dataset", "redistill.loading"])
    return context


def start_worker(worker: int) -> None:
    """Ctrl-C in a terminal reaches the whole group; the main process decides what it means."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batch_loader(
    dataset: torch.utils.data.Dataset[Any],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    collate: Callable[[list[Any]], Any],
    pin: bool = False,
) -> torch.utils.data.DataLoader[Any]:
    """A loader that gives `collate(dataset.__getitems__(batch))` for each of `batches`, in their order.

    `batches` is read a few batches ahead of what has been given.
    """
    many: dict[str, Any] = {}
    if workers:
        many = {
            "num_workers": workers,
            "prefetch_factor": PREFETCH,
            "multiprocessing_context": worker_context(),
            "worker_init_fn": start_worker,
        }
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of index lists will do
        collate_fn=collate,
        pin_memory=pin,
        generator=torch.Generator(),  # else iterating draws from the global generator, and changes what comes after
        **many,
    )
