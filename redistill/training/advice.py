"""Losses that were far less accurate than others where they were compared: `train` says so, and trains as it is told.

The comparison is bench/study.py; its numbers are in docs/LOSSES.md, "Which loss, when".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from redistill.losses.objective import Objective, Term

__all__ = ["advice"]

SOFTENED = ("power", "kl", "kd")
"""Losses of the comparison whose temperature is that of both networks."""


def advice(objectives: Iterable[Objective]) -> Iterator[str]:
    """A line for each such term."""
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
