"""Load batches of dataset items in worker processes; used by both stages."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch
from redistill_cache.errors import RedistillError, Refused
from redistill_cache.machine import usable_cores

from redistill.specs import first_line

__all__ = ["BatchLoader", "default_workers", "worker_context"]

MAX_WORKERS = 16
PREFETCH = 4

Tag = TypeVar("Tag")


def default_workers(local_processes: int = 1) -> int:
    """Worker processes for each of `local_processes` main processes on this machine."""
    return max(1, min(usable_cores() // local_processes, MAX_WORKERS))


class BatchLoader:
    """Loads `collate(dataset.__getitems__(indices))` in worker processes, or in this process with `workers=0`.

    With `persistent`, the workers of the first `load` serve the following ones until `close`. A RedistillError in a
    worker is raised here unchanged.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[Any],
        *,
        workers: int,
        collate: Callable[[list[Any]], Any],
        pin: bool = False,
        persistent: bool = False,
    ) -> None:
        worker_options: dict[str, Any] = {}
        if workers:
            worker_options = {
                "num_workers": workers,
                "prefetch_factor": PREFETCH,
                "multiprocessing_context": worker_context(),
                "worker_init_fn": init_worker,
                "persistent_workers": persistent,
            }
        self._sampler = _Sampler()
        with ignore_worker_count_warning():
            self._loader = torch.utils.data.DataLoader(
                _ReturnErrors(dataset),
                batch_sampler=self._sampler,  # type: ignore[arg-type]  # any iterable of index lists will do
                collate_fn=_CollateUnlessError(collate),
                pin_memory=pin,
                generator=torch.Generator(),  # otherwise each iteration advances the global generator
                **worker_options,
            )

    def load(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Any]]:
        """(tag, batch) for every (tag, indices), in order. `batches` is consumed a few batches ahead."""
        tags: deque[Tag] = deque()

        def indices_of_batches() -> Iterator[Sequence[int]]:
            for tag, indices in batches:
                tags.append(tag)
                yield indices

        self._sampler.batches = indices_of_batches()
        with ignore_worker_count_warning():
            iterator = iter(self._loader)
        try:
            for batch in iterator:
                if isinstance(batch, RedistillError):
                    raise batch
                yield tags.popleft(), batch
        except (RuntimeError, EOFError, OSError) as error:  # the latter two if a worker dies while sending a batch
            if not worker_exited(iterator):
                raise
            raise Refused(
                f"a rendering worker died ({first_line(error)}); if memory ran out, use fewer --workers"
            ) from error

    def close(self) -> None:
        """Stop persistent workers now. At interpreter exit, each may take seconds."""
        iterator = self._loader._iterator
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


class _Sampler:
    """The batches of the current `load`. A DataLoader has the same sampler in all its iterations."""

    def __init__(self) -> None:
        self.batches: Iterator[Sequence[int]] = iter(())

    def __iter__(self) -> Iterator[Sequence[int]]:
        return self.batches


# A DataLoader re-raises a worker's exception as a copy whose text is a traceback. So a worker returns a RedistillError
# as if it were the batch, and `load` raises it.


@dataclass(frozen=True)
class _ReturnErrors(torch.utils.data.Dataset[Any]):
    dataset: torch.utils.data.Dataset[Any]

    def __getitems__(self, indices: Sequence[int]) -> Any:  # noqa: ANN401  a list of items, or an error
        try:
            return self.dataset.__getitems__(indices)  # type: ignore[attr-defined]
        except RedistillError as error:
            return error


@dataclass(frozen=True)
class _CollateUnlessError:
    collate: Callable[[list[Any]], Any]

    def __call__(self, items: Any) -> Any:  # noqa: ANN401  a batch, or an error
        return items if isinstance(items, RedistillError) else self.collate(items)


# -- worker processes -------------------------------------------------------------------------------------------------


def worker_context() -> BaseContext:
    """Workers are forked from a small server process that has imported torch and has no threads.

    Forking this process would copy locks that its threads hold; spawning would import torch once per worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["redistill.views.dataset", "redistill.loading"])
    return context


def init_worker(worker: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to the whole group: the main process handles it.

    Exit when the main process dies. torch watches the parent for this, but here the parent is the fork server.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_main_process, daemon=True).start()


def exit_with_main_process() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        signal.raise_signal(signal.SIGKILL)


def worker_exited(iterator: object) -> bool:
    """Whether a worker is dead, or dies within a second: its pipes may close before it does."""
    return bool(wait([worker.sentinel for worker in getattr(iterator, "_workers", ())], timeout=1))


@contextmanager
def ignore_worker_count_warning() -> Iterator[None]:
    """torch warns of more workers than cores; --workers is the user's decision."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield
