"""Charts of no values, of a single value and of extreme values."""

from __future__ import annotations

from redistill.report.charts import Curve, Series, histogram, line_chart, nice_ticks, row_chart
from redistill.report.runs import LineStyle


def test_no_values_make_no_chart():
    assert line_chart("t", []) == ""
    assert line_chart("t", [Curve("a", [], LineStyle())]) == ""
    assert histogram("t", {}) == ""


def test_one_epoch_is_a_dot_and_more_are_a_line():
    assert "circle" in line_chart("t", [Curve("a", [(1.0, [0.5])], LineStyle())])
    assert "polyline" in line_chart("t", [Curve("a", [(1.0, [0.0]), (2.0, [5e-324])], LineStyle())])


def test_ticks_are_round_and_span_the_values():
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(nice_ticks(3.0, 3.0)) >= 2


def test_names_in_charts_are_escaped():
    chart = line_chart("<title>", [Curve("<script>\u202e", [(1.0, [0.5])], LineStyle())])
    assert "&lt;script&gt;\\x202e" in chart
    assert "<script" not in chart
    assert 'aria-label="&lt;title&gt;"' in chart


def test_a_row_has_a_dot_for_each_series_and_the_value_of_the_first():
    series = [Series("Q", [0.25, -1.5], LineStyle(0)), Series("S", [2.0, 0.0], LineStyle(1))]
    chart = row_chart("t", ["<b>", "layer2"], series)
    assert chart.count("<circle") == 4
    assert ">0.25<" in chart
    assert ">-1.50<" in chart
    assert "&lt;b&gt;" in chart
    assert "circle" in row_chart("t", ["a"], [Series("Q", [0.0], LineStyle())])
