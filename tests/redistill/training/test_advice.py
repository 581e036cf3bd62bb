"""The lines about choices that were far less accurate than others."""

from __future__ import annotations

import pytest

from redistill.losses.catalogue import CATALOGUE
from redistill.losses.objective import Objective
from redistill.training.advice import SOFTENED, advice


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        *[(f"{name}?temperature=1", ["add temperature=4 or 8"]) for name in SOFTENED],
        ("power?form=cressie-read", ["literal form"]),
        ("power?form=density&temperature=0.5", ["temperature=4 or 8", "number of classes"]),
    ],
)
def test_a_loss_that_did_badly_is_told_once_in_one_line(loss: str, said: list[str]):
    lines = list(advice([Objective([loss]), Objective([loss, "ce?weight=1"])], views=8, epochs=160))
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert line.startswith(f"--loss {loss}: ")
        assert part in line
        assert "\n" not in line


def test_nothing_is_said_of_the_defaults_of_any_loss():
    logits = [name for name, entry in CATALOGUE.items() if not entry.on_features and not entry.widths]
    assert len(logits) > 25
    assert list(advice([Objective([name]) for name in logits], views=2, epochs=160)) == []
    assert list(advice([Objective(["power?calibrate=1&temperature=8"]), Objective(["ce?weight=1"])], 8, 160)) == []


def test_a_view_that_is_repeated_is_told():
    objectives = [Objective(["power"])]
    (line,) = advice(objectives, views=1, epochs=9)
    assert line.startswith("training repeats the only view of the archive for 9 epochs; ")
    assert "\n" not in line
    assert not list(advice(objectives, views=1, epochs=8))
    assert not list(advice(objectives, views=2, epochs=300))
