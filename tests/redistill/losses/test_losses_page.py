"""docs/LOSSES.md lists every loss of the catalogue with its published weights, and no other."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from redistill import losses
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
    on_logits = {name: entry for name, entry in CATALOGUE.items() if not entry.on_features}
    assert family() == {name: (entry.ce_weight, entry.weight) for name, entry in on_logits.items()}
    assert {name: entry.make for name, entry in CATALOGUE.items() if entry.on_features} == ON_FEATURES


def test_the_plots_of_the_page_exist():
    for plot in re.findall(r"\]\((plots/\S+)\)", PAGE.read_text()):
        assert (PAGE.parent / plot).stat().st_size > 1000


ON_FEATURES = {
    "features": losses.FeatureMatch,
    "rkd": losses.rkd,
    "nd": losses.NormDirection,
    "vkd": losses.OrthogonalMatch,
    "dcd": losses.Contrast,
    "dual": losses.DualHead,
    "exit": losses.ExitHead,
    "lelp": losses.SubclassHead,
    "pesf": losses.AdaptedTeacher,
}


@pytest.mark.parametrize("name", ON_FEATURES)
def test_the_row_of_a_loss_on_features_has_its_needs_and_defaults(name):
    table = PAGE.read_text().partition("## Losses on features")[2].partition("## The family")[0]
    (row,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
    make = ON_FEATURES[name]
    assert cells[4] == f"{CATALOGUE[name].ce_weight:g} / {CATALOGUE[name].weight:g}"
    parameters = inspect.signature(make).parameters.values()
    options = {p.name: p.default for p in parameters if isinstance(p.default, (bool, int, float, str))}
    written = dict(re.findall(r"(\w+)=([\w.]+)", cells[5]))
    assert written == {
        key: f"{value:g}" if isinstance(value, float) else str(value).lower()
        for key, value in options.items()
        if key != "reduction"
    }
    is_module = isinstance(make, type) and issubclass(make, torch.nn.Module)
    inputs = inspect.signature(make.forward if is_module else make).parameters
    expected = {"t features": "teacher_features", "t logits": "teacher_logits", "labels": "labels"}
    assert [text in cells[3] for text in expected] == [key in inputs for key in expected.values()]
    assert ("fit" in cells[3]) == hasattr(make, "fit")
