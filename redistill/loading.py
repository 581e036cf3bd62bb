"""Load batches of dataset items in worker processes; used by both stages."""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, reduction
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from redistill_cache.errors import RedistillError, Refused
from redistill_cache.machine import usable_cores
from redistill_cache.wording import human_bytes
from torch import Tensor

from redistill.interrupts import interrupts_blocked
from redistill.specs import first_line

__all__ = ["BatchLoader", "default_workers", "refuse_few_open_files", "worker_context"]

# By default. Those of training and of validation together stay within 1,024 open files, the usual limit.
MAX_WORKERS = 48
PREFETCH = 4
# Longer than a worker takes to end where there is a lot to do; and after an error that other causes have as well.
ENDING_S, MAYBE_ENDING_S = 60.0, 5.0
# Where Linux keeps the semaphores of processes, a page for each: three of a worker, and eight of all together.
SHM, LOCKS_OF_WORKER, LOCKS_OF_WORKERS = Path("/dev/shm"), 3, 8
# Open files of the main process: of a worker (pipes, and one for each batch that it may be ahead), and of all together.
FILES_OF_WORKER, FILES_OF_WORKERS = 4 + PREFETCH, 12

Tag = TypeVar("Tag")


def default_workers(local_processes: int = 1) -> int:
    """Worker processes for each of `local_processes` main processes on this machine."""
    return max(1, min(usable_cores() // local_processes, MAX_WORKERS))


class BatchLoader:
    """Loads `collate(dataset.__getitems__(indices))` in worker processes, or in this process with `workers=0`.

    The workers start with the first `load` and serve the following ones until the context ends. A RedistillError in a
    worker is raised here unchanged.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[Any],
        *,
        workers: int,
        collate: Callable[[list[Any]], Any],
        pin: bool = False,
    ) -> None:
        worker_options: dict[str, Any] = {}
        if workers:
            worker_options = {
                "num_workers": workers,
                "prefetch_factor": PREFETCH,
                "multiprocessing_context": worker_context(),
                "worker_init_fn": init_worker,
                "persistent_workers": True,
            }
        self._workers = workers
        self._iterator: Any = None  # of the DataLoader; it owns the workers
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

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers now: if this is left to the end of the interpreter, each of them may take seconds."""
        iterator, self._iterator = self._iterator, None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            for worker in iterator._workers:  # torch terminates those that take seconds, and does not wait for them
                worker.join(ENDING_S)

    def load(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Any]]:
        """(tag, batch) for every (tag, indices), in order. `batches` is consumed a few batches ahead."""
        tags: deque[Tag] = deque()

        def indices_of_batches() -> Iterator[Sequence[int]]:
            for tag, indices in batches:
                tags.append(tag)
                yield indices

        self._sampler.batches = indices_of_batches()
        try:
            for batch in self._start():
                if isinstance(batch, RedistillError):
                    raise batch
                yield tags.popleft(), batch
        except (RuntimeError, EOFError, OSError) as error:  # the latter two if a worker dies while sending a batch
            if "Too many open files" in str(error):
                raise too_few_open_files(self._workers) from error
            if not worker_exited(self._iterator, MAYBE_ENDING_S if isinstance(error, RuntimeError) else ENDING_S):
                raise
            raise Refused(
                f"a rendering worker died ({first_line(error)}); if memory ran out, use fewer --workers"
            ) from error

    def _start(self) -> Iterator[Any]:
        """The batches of a new pass, by workers that start now or wait for it since the last one."""
        if self._workers and self._iterator is None:
            refuse_few_open_files(self._workers)
            refuse_full_shm(self._workers)
            with interrupts_blocked():  # the server imports torch for seconds, and Ctrl-C would end it
                forkserver.ensure_running()
        try:
            with ignore_worker_count_warning():
                self._iterator = iterator = iter(self._loader)
        except (EOFError, OSError) as error:
            raise Refused(f"cannot start {self._workers} workers: {first_line(error)}; use fewer --workers") from error
        return iterator


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
        if isinstance(items, RedistillError):
            return items
        batch = self.collate(items)
        in_worker = torch.utils.data.get_worker_info() is not None
        return _InMemoryFile(batch) if in_worker and hasattr(os, "memfd_create") else batch


# -- batches on their way to the main process -------------------------------------------------------------------------
#
# torch would send tensors in files of /dev/shm. Docker gives it 64 MB, which four workers with batches of 128 images of
# 224 px fill at once; torch then prints a traceback in the worker, and the main process waits forever. A memory file
# belongs to no mounted file system. The message beside it is short enough for a single write to the pipe, so a worker
# that is killed never leaves a part of one, for the rest of which the main process would wait.

ALIGNMENT = 64


class _InMemoryFile:
    """Pickles as the batch, with the data of its tensors in a memory file."""

    def __init__(self, batch: Any) -> None:  # noqa: ANN401  tensors in any structure
        self.batch = batch

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        message, arrays = io.BytesIO(), list[memoryview]()
        _TensorPickler(message, 5, buffer_callback=lambda buffer: arrays.append(buffer.raw())).dump(self.batch)
        places, end = list[slice](), 0
        for array in arrays:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + array.nbytes
            places.append(slice(start, end))
        try:
            with os.fdopen(os.memfd_create("redistill batch"), "wb") as file:
                for place, array in zip(places, arrays, strict=True):
                    file.seek(place.start)
                    file.write(array)
                file.flush()
                return _from_memory_file, (message.getvalue(), places, reduction.DupFd(file.fileno()))
        except OSError as error:
            reason = f"cannot send a batch of {human_bytes(end)} from a worker: {error.strerror}"
            return Refused, (f"{reason}; use fewer --workers or a smaller --batch-size",)


class _TensorPickler(pickle.Pickler):
    """Tensors as arrays, because arrays can be pickled without their data."""

    def reducer_override(self, value: object) -> Any:  # noqa: ANN401  how to rebuild the value
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _from_memory_file(message: bytes, places: list[slice], file: Any) -> Any:  # noqa: ANN401  the batch
    number = file.detach()
    try:
        data = memoryview(mmap.mmap(number, 0))  # unmapped with the last tensor
    finally:
        os.close(number)
    return pickle.loads(message, buffers=[data[place] for place in places])


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


def refuse_few_open_files(workers: int) -> None:
    """A limit that is reached later leaves the main process without a way to hear from its workers."""
    needed = len(list(Path("/dev/fd").iterdir())) + FILES_OF_WORKERS + workers * FILES_OF_WORKER
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise too_few_open_files(workers)


def too_few_open_files(workers: int) -> Refused:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Refused(
        f"this process may open {limit} files, too few for {workers} workers; raise ulimit -n or use fewer --workers"
    )


def refuse_full_shm(workers: int) -> None:
    """torch would print a traceback beside the error."""
    if not SHM.is_dir():
        return
    system = os.statvfs(SHM)
    needed = (LOCKS_OF_WORKER * workers + LOCKS_OF_WORKERS) * mmap.PAGESIZE
    free = system.f_bavail * system.f_frsize
    if system.f_blocks and free < needed:  # no blocks: unlimited
        raise Refused(
            f"{SHM} has {human_bytes(free)} left, too little for the locks of {workers} workers "
            f"({human_bytes(needed)}); free or enlarge it (docker run --shm-size), or use --workers 0"
        )


def worker_exited(iterator: object, within: float) -> bool:
    """Whether a worker is dead, or dies soon: its pipes close before the server that started it says so."""
    return bool(wait([worker.sentinel for worker in getattr(iterator, "_workers", ())], timeout=within))


@contextmanager
def ignore_worker_count_warning() -> Iterator[None]:
    """torch warns of more workers than cores; --workers is the user's decision."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield
