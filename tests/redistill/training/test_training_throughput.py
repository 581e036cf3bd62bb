"""Waiting is that of the device that computes: a host that only queues steps waits for data while the GPU is busy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from redistill.training.throughput import Throughput


@dataclass
class Queue:
    """A device that works off its queue, and a host that fills it; both in seconds. A clock, as of CUDA events."""

    host: float = 0.0
    idle_from: float = 0.0

    def work(self, seconds: float) -> None:
        self.idle_from = self.now() + seconds

    def now(self) -> float:
        return max(self.host, self.idle_from)

    def seconds(self, start: float, end: float) -> float:
        assert end <= self.host, "asked for a moment that the device has not reached"
        return end - start


@pytest.mark.parametrize(("loading", "waited"), [(0.5, 0.5), (1.5, 1.5 + 10 * 0.5)])
def test_a_gpu_waits_only_while_it_has_nothing_to_do(loading: float, waited: float):
    """Steps of one second; the host needs `loading` for a batch and none to queue a step."""
    queue = Queue()
    throughput = Throughput(queue)
    for _ in range(11):
        queue.host += loading
        throughput.batch_ready()
        queue.work(1.0)
        throughput.batch_done(8)
    queue.host = queue.idle_from  # the host reads a loss
    times = throughput.times()
    assert times.waiting * times.seconds == pytest.approx(waited)
    assert times.images_per_second * times.seconds == pytest.approx(88)
