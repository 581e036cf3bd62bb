"""Reads that cannot fit into the memory of this process are refused, whatever limits it."""

from __future__ import annotations

import pytest
from redistill_cache import machine
from redistill_cache.errors import Refused
from redistill_cache.machine import require_memory


def test_memory_is_compared_with_the_limit_of_the_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "memory_limit", lambda: 2 << 30)  # as of a container
    require_memory(2 << 30, "a view")
    with pytest.raises(
        Refused, match=r"^a view: needs 3\.0 GiB of memory, this process may use 2\.0 GiB; use a machine"
    ):
        require_memory(3 << 30, "a view")
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    require_memory(1 << 60, "a view")
