"""Choices that were far less accurate than others where they were compared: `train` says so, and trains as it is told.

The comparison is bench/study.py; its numbers are in docs/LOSSES.md, "Which loss, when".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from redistill.losses.objective import Objective, Term

__all__ = ["advice"]

SOFTENED = ("power", "kl", "kd")
"""Losses of the comparison whose temperature is that of both networks."""


MANY_EPOCHS = 8
"""As many as the views of the comparison, which a student sees once in them."""


def advice(objectives: Iterable[Objective], views: int, epochs: int) -> Iterator[str]:
    """A line for each such term, and for a single view."""
    if views == 1 and epochs > MANY_EPOCHS:
        yield (
            f"training repeats the only view of the archive for {epochs} epochs; in a comparison distilled students "
            "of 8 views were 28 to 51 points more accurate (docs/LOSSES.md, How many views)"
        )
    terms = {term.text: term for objective in objectives for term in objective.all_terms}
    for text, term in terms.items():
        for line in _of_term(term):
            yield f"--loss {text}: {line} (docs/LOSSES.md, Which loss, when)"


def _of_term(term: Term) -> Iterator[str]:
    options = term.options
    if term.entry.name in SOFTENED and float(options["temperature"]) <= 1:
        yield "at temperature 1 students were up to 29 points less accurate than at 4; add temperature=4 or 8"
    if term.entry.name == "power" and options["form"] == "cressie-read":
        yield "students of the literal form were up to 27 points less accurate than those of kl; leave out form"
    if term.entry.name == "power" and options["form"] == "density":
        yield "its weight depends on the number of classes: with 40, 16 points less than kl; leave out form"
