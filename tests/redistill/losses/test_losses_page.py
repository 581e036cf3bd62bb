"""docs/LOSSES.md lists every loss of the catalogue with its published weights, and no other."""

import re
from pathlib import Path

from redistill.losses import CATALOGUE

PAGE = Path(__file__).parents[3] / "docs" / "LOSSES.md"


def family():
    """name -> (ce weight, term weight) in the last table of the page."""
    weights_of = {}
    table = PAGE.read_text().partition("## The family")[2]
    for line in table.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        names = re.findall(r"`(\w+)`", cells[1]) if len(cells) > 4 else []
        weights = [tuple(map(float, pair.split("/"))) for pair in cells[4].split(",")] if names and cells[4] else []
        weights_of |= dict(zip(names, weights * len(names) if len(weights) == 1 else weights, strict=bool(weights)))
    return weights_of


def test_the_page_has_every_loss_with_its_weights():
    assert family() == {name: (entry.ce_weight, entry.weight) for name, entry in CATALOGUE.items()}


def test_the_plots_of_the_page_exist():
    for plot in re.findall(r"\]\((plots/\S+)\)", PAGE.read_text()):
        assert (PAGE.parent / plot).stat().st_size > 1000
