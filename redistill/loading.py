"""Batches of a dataset from worker processes, the same way for both stages."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any

import torch
from redistill_cache.errors import RedistillError, Refused
from redistill_cache.machine import usable_cores

from redistill.specs import first_line

__all__ = ["Batches", "batch_loader", "default_workers", "worker_context"]

MOST_WORKERS = 16
PREFETCH = 4


def default_workers(processes_here: int = 1) -> int:
    """Worker processes for one of `processes_here` training processes on this machine."""
    return max(1, min(usable_cores() // processes_here, MOST_WORKERS))


def worker_context() -> BaseContext:
    """Workers are forked from a small server that has torch imported and no threads.

    Forking this process instead would copy the locks of its threads; spawning would import torch for every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["redistill.views.dataset", "redistill.loading"])
    return context


def start_worker(worker: int) -> None:
    """Ctrl-C in a terminal reaches the whole group; the main process decides what it means.

    Where that is killed, workers go as well. torch looks for it in the parent, which here is the server they come from.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_main, daemon=True).start()


def end_with_main() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        signal.raise_signal(signal.SIGKILL)


def batch_loader(
    dataset: torch.utils.data.Dataset[Any],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    collate: Callable[[list[Any]], Any],
    pin: bool = False,
    keep: bool = False,
) -> Batches:
    """Gives `collate(dataset.__getitems__(batch))` for each of `batches`, in their order.

    `batches` is read a few batches ahead of what has been given. With `keep`, workers live on for the next iteration,
    which reads `batches` again. What a worker refuses is raised here, as one line.
    """
    many: dict[str, Any] = {}
    if workers:
        many = {
            "num_workers": workers,
            "prefetch_factor": PREFETCH,
            "multiprocessing_context": worker_context(),
            "worker_init_fn": start_worker,
            "persistent_workers": keep,
        }
    with no_advice_on_workers():
        loader = torch.utils.data.DataLoader(
            Caught(dataset),
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of index lists will do
            collate_fn=Collated(collate),
            pin_memory=pin,
            generator=torch.Generator(),  # else iterating draws from the global one, and changes what comes after
            **many,
        )
    return Batches(loader)


class Batches:
    """What a loader gives. To be closed where workers were to be kept."""

    def __init__(self, loader: torch.utils.data.DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        with no_advice_on_workers():
            batches = iter(self._loader)
        try:
            for batch in batches:
                if isinstance(batch, RedistillError):
                    raise batch
                yield batch
        except (RuntimeError, EOFError, OSError) as error:  # the latter two while it hands its last batch over
            if not self._has_lost_a_worker(batches):
                raise
            raise Refused(
                f"a process that renders images has died ({first_line(error)}); if memory ran out, use fewer --workers"
            ) from error

    @staticmethod
    def _has_lost_a_worker(batches: object) -> bool:
        """Whether one is gone, or goes within a second: its pipes may close before it does."""
        return bool(wait([worker.sentinel for worker in getattr(batches, "_workers", ())], timeout=1))

    def close(self) -> None:
        """End the workers now: left to the end of the interpreter, each may take seconds."""
        kept = self._loader._iterator
        if kept is not None and hasattr(kept, "_shutdown_workers"):
            kept._shutdown_workers()


@contextmanager
def no_advice_on_workers() -> Iterator[None]:
    """torch has an opinion on more workers than cores; whoever asks for them has one, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


# torch hands on what a worker raises as text with a traceback inside. An error that is meant for a user travels as a
# value instead: caught in the worker, left alone by the collation, raised where the batch is asked for.


@dataclass(frozen=True)
class Caught(torch.utils.data.Dataset[Any]):
    dataset: torch.utils.data.Dataset[Any]

    def __getitems__(self, indices: Sequence[int]) -> Any:  # noqa: ANN401  a list of items, or an error
        try:
            return self.dataset.__getitems__(indices)  # type: ignore[attr-defined]
        except RedistillError as error:
            return error


@dataclass(frozen=True)
class Collated:
    collate: Callable[[list[Any]], Any]

    def __call__(self, items: Any) -> Any:  # noqa: ANN401  a batch, or an error
        return items if isinstance(items, RedistillError) else self.collate(items)
