"""Images per second of an epoch, and the share of the time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["Clock", "EpochTimes", "Throughput", "clock_of"]


class EpochTimes(NamedTuple):
    seconds: float
    images_per_second: float
    waiting: float
    """Share of the time in which no batch was ready, or the teacher's view was still loading."""


class Clock(Protocol):
    """Where steps are timed."""

    def now(self) -> Any: ...  # noqa: ANN401  a moment, for `seconds` only

    def seconds(self, start: Any, end: Any) -> float: ...  # noqa: ANN401


class HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Moments at which the GPU arrives at this point of its queue. The host, which only fills the queue, does not wait
    for them before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Throughput:
    """The times of an epoch so far; validation is not counted.

    Waiting is what lies between the end of a step and the beginning of the next one, on the device that computes them.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.start()

    def start(self) -> None:
        self.started = time.perf_counter()
        self.last_done = self.clock.now()
        self.waits: list[tuple[Any, Any]] = []
        self.waited = 0.0
        self.images = 0

    def batch_ready(self) -> None:
        self.waits.append((self.last_done, self.clock.now()))

    def batch_done(self, images: int) -> None:
        self.last_done = self.clock.now()
        self.images += images

    def times(self) -> EpochTimes:
        """Waits for the device to arrive at the last batch."""
        self.waited += sum(self.clock.seconds(start, end) for start, end in self.waits)
        self.waits.clear()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return EpochTimes(seconds, self.images / seconds, self.waited / seconds)
