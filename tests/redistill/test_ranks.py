"""Ranks from torchrun's variables, and the order in which they share blocks."""

from __future__ import annotations

import pytest
from redistill_cache.errors import UsageError

from redistill.ranks import Rank


def test_every_rank_visits_every_block_starting_with_its_own_share():
    ranks = [Rank(rank, 3, rank, 3).work_order(range(11)) for rank in range(3)]
    assert [sorted(order) for order in ranks] == [list(range(11))] * 3
    assert [order[:3] for order in ranks] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert len({order[-1] for order in ranks}) == 3, "ranks that finish early help with different blocks"


@pytest.mark.parametrize("rank", ["one", "2", "-1"])
def test_invalid_rank_variables(monkeypatch: pytest.MonkeyPatch, rank: str):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK"):
        Rank.from_environment()
