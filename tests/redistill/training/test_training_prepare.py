"""What is checked before the first step."""

from __future__ import annotations

import pytest
import torch
from redistill_cache.errors import Refused

from redistill.losses.objective import Objective
from redistill.training.prepare import try_mixed_labels


def test_trying_a_loss_on_mixed_labels_does_not_change_its_state():
    """TAID updates its buffers in training steps; the objective that was tried is the one that is trained."""
    objective = Objective(("taid",))
    before = {name: value.clone() for name, value in objective.named_buffers()}
    assert before
    try_mixed_labels(objective, 8)
    for name, value in objective.named_buffers():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_a_loss_without_a_value_per_row_is_refused_for_mixed_labels():
    with pytest.raises(Refused, match="needs one label per row"):
        try_mixed_labels(Objective(("topkd",)), 8)
