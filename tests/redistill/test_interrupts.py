"""A stop request is either handled in the block or passed on, never lost."""
# ruff: noqa: PT012  # the tests are about blocks that raise

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

import pytest
from redistill_cache.errors import Refused

from redistill.interrupts import Interrupted, interrupts_blocked, raise_on_signals, stop_on_signals


@pytest.fixture(autouse=True)
def _python_handles_ctrl_c() -> Iterator[None]:
    """As in a terminal; processes that a shell starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_request_waits_until_it_is_checked():
    with pytest.raises(Interrupted, match="SIGTERM; again") as caught, stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        stop.raise_if_set("again")
    assert caught.value.exit_code == 143


def test_an_unchecked_request_reaches_the_outer_handler():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted), stop_on_signals() as outer:
        with stop_on_signals():
            signal.raise_signal(signal.SIGINT)
        outer.raise_if_set("again")


def test_an_error_after_a_request_becomes_interrupted():
    with pytest.raises(Interrupted, match="then again"), stop_on_signals("then again"):
        signal.raise_signal(signal.SIGINT)
        raise Refused("a worker has died")


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_preparations_end_at_once(number: signal.Signals):
    with stop_on_signals() as stop:
        with pytest.raises(Interrupted, match=f"{number.name}; again") as caught, raise_on_signals("again"):
            signal.raise_signal(number)
            pytest.fail("still running")
        assert not stop
    assert caught.value.exit_code == 128 + number


def blocked_signals() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_processes_that_start_while_interrupts_are_blocked_never_receive_them():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert signal.SIGINT not in pool.apply(blocked_signals)
    with interrupts_blocked():
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        assert signal.SIGINT in pool.apply(blocked_signals)
    assert signal.SIGINT not in blocked_signals()
    with pytest.raises(KeyboardInterrupt), interrupts_blocked():
        signal.raise_signal(signal.SIGINT)
