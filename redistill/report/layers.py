"""The page about the layers of a teacher, ranked by their quality for distillation."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from redistill_cache.errors import UsageError
from redistill_cache.storage import LOCAL, disk_trouble

from redistill.caching.rank_layers import ADVICE, LayerRanking
from redistill.report.charts import Figure, Series, row_chart
from redistill.report.page import environment
from redistill.report.runs import LineStyle

__all__ = ["write_layers_page"]

COLUMNS = ("layer", "output", "rank", "Q", "S", "I", "E", "Q of pooled rows")


def write_layers_page(ranking: LayerRanking, out: Path) -> None:
    """Write an HTML page with the chart and the table of `ranking`."""
    if out.is_dir():
        raise UsageError(f"--page {out} is a folder; pass the file to write, such as {out / 'layers.html'}")
    layers = ranking.layers
    series = [
        Series("Q", [layer.quality.q for layer in layers], LineStyle(0)),
        Series("S, separation", [layer.quality.separation for layer in layers], LineStyle(2)),
        Series("I, information", [layer.quality.information for layer in layers], LineStyle(1)),
        Series("E, efficiency", [layer.quality.efficiency for layer in layers], LineStyle(3)),
    ]
    chart = row_chart("quality by layer", [layer.layer for layer in layers], series)
    context = {
        "title": f"Layers of {ranking.teacher}",
        "summary": f"{len(layers)} layers, on {ranking.images:,} images of {ranking.classes:,} classes.",
        "advice": ADVICE,
        "series": series,
        "figures": [Figure("", chart, "from the input of the network (top) to its output")],
        "columns": COLUMNS,
        "rows": ranking.table(),
        "version": metadata.version("redistill"),
    }
    page = environment().get_template("layers.html").render(context)
    with disk_trouble("write", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        LOCAL.publish(out, page.encode())
