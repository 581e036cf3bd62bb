"""Turn Ctrl-C and SIGTERM into a stop request, so that a long loop can stop at a safe point.

Preparations have no such point, and nothing to save: there, a signal ends the command at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from redistill_cache.errors import RedistillError

__all__ = [
    "Interrupted",
    "StopRequest",
    "interrupts_blocked",
    "raise_on_signals",
    "stop_on_signals",
    "stop_requested",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_current: list[StopRequest] = []  # of the blocks of `stop_on_signals` that run, the inner ones last
RERUN = "run the same command again to continue; finished work is not repeated"


class Interrupted(RedistillError):
    """The user or the scheduler requested a stop, and finished work is on disk."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}; {advice}")
        self.exit_code = 128 + number


class StopRequest:
    """Set by the first signal. The handlers are restored then, so a second signal has its usual effect."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def raise_if_set(self, advice: str = RERUN) -> None:
        if self.number is not None:
            raise Interrupted(self.number, advice)


@contextmanager
def stop_on_signals(advice: str = RERUN) -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM only set the request. Outside the main thread it is never set.

    A scheduler signals all processes of a job, workers included, so an error after a request is taken as a consequence
    of the signal and leaves the block as `Interrupted` with this advice.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def set_request(number: int, _: FrameType | None) -> None:
        request.number = number
        signal.signal(number, previous[number])

    for number in SIGNALS:
        signal.signal(number, set_request)
    _current.append(request)
    try:
        yield request
    except RedistillError as error:
        if request.number is not None and not isinstance(error, Interrupted):
            raise Interrupted(request.number, advice) from error
        raise
    finally:
        _current.remove(request)
        for number in SIGNALS:
            signal.signal(number, previous[number])
    if request.number is not None:
        signal.raise_signal(request.number)  # the block ended without checking it; leave it to the outer handler


def stop_requested() -> bool:
    """Whether a stop was requested, for what waits inside the block: a download."""
    return any(_current)


@contextmanager
def raise_on_signals(advice: str = RERUN) -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM raise `Interrupted` at once. Outside the main thread, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Interrupted(number, advice)

    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, previous[number])


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Processes started within the block never receive Ctrl-C, which a terminal sends to all processes of a command.

    Here, a Ctrl-C within the block takes effect at its end.
    """
    resource_tracker.ensure_running()  # the start of a process does this first, and it unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
