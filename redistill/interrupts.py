"""Ctrl-C and SIGTERM as a request: the loop that spends the hours ends at a place of its own choosing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from redistill_cache.errors import RedistillError

__all__ = ["Interrupted", "StopRequest", "stop_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "run the same command again to continue: what is finished is kept"


class Interrupted(RedistillError):
    """The user or the scheduler asked to stop, and everything worth keeping was kept."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}; {advice}")
        self.exit_code = 128 + number


class StopRequest:
    """Set by the first signal. A second one is not caught: whoever presses Ctrl-C twice means it."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def raise_if_set(self, advice: str = AGAIN) -> None:
        if self.number is not None:
            raise Interrupted(self.number, advice)


@contextmanager
def stop_on_signals(advice: str = AGAIN) -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM only set the request. In other threads than the main one it is never set.

    A scheduler signals all processes of a job, workers included. So what fails once the request is set, fails because
    of it, and leaves the block as `Interrupted` with this advice.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, _: FrameType | None) -> None:
        request.number = number
        signal.signal(number, before[number])

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    except RedistillError as error:
        if request.number is not None and not isinstance(error, Interrupted):
            raise Interrupted(request.number, advice) from error
        raise
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
    if request.number is not None:
        signal.raise_signal(request.number)  # nobody in the block looked any more; whoever is around it will
