"""Ranks from torchrun's variables."""

from __future__ import annotations

import pytest
from redistill_cache.errors import UsageError

from redistill.ranks import Rank


@pytest.mark.parametrize("rank", ["one", "2", "-1"])
def test_invalid_rank_variables(monkeypatch: pytest.MonkeyPatch, rank: str):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK"):
        Rank.from_environment()


def test_training_under_srun_alone_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Each of the processes would train the same student on all images."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UsageError, match=r"srun started 8 processes, .* start one torchrun on each node"):
        Rank.from_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert Rank.from_environment() == Rank()
