"""What is checked before the first step."""

from __future__ import annotations

import pytest
from redistill_cache.errors import Refused

from redistill.losses.objective import Objective


def test_a_loss_without_a_value_per_row_is_refused_for_mixed_labels():
    (term,) = Objective(("topkd",)).all_terms
    with pytest.raises(Refused, match="needs one label per row"):
        term.refuse_mix()
