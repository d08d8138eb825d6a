"""Charts are pure functions: counted, parsed as XML, and read back in numbers."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest

from tunesmith.report.charts import Bar, Interval, Line, bar_chart, interval_chart, line_chart, nice_ticks, thin, tick_label


def parsed(svg):
    return ElementTree.fromstring(svg)


def of_class(svg, tag, kind):
    return [element for element in parsed(svg).iter(tag) if kind in element.get("class", "").split()]


def line_of(points, kind="train"):
    return line_chart([Line("loss", points, kind)], name="Loss", x_label="step", y_label="loss")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 5e-4, [0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4]),
        (3, 97, [0, 20, 40, 60, 80, 100]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 12_345, [0, 2500, 5000, 7500, 10_000, 12_500]),
    ],
)
def test_ticks_are_round_numbers_that_enclose_the_range(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high"), [(7, 7), (0, 0), (-3, -3), (5, 1), (math.nan, 1), (0, math.inf), (1e-12, 2e-12), (1e15, 1e15 + 4)]
)
def test_ticks_of_a_degenerate_range_are_finite_rising_and_at_least_two(low, high):
    ticks = nice_ticks(low, high)
    assert len(ticks) >= 2
    assert all(map(math.isfinite, ticks))
    assert all(a < b for a, b in itertools.pairwise(ticks))


@pytest.mark.parametrize(
    ("tick", "step", "label"), [(0.25, 0.25, "0.25"), (1000, 500, "1,000"), (2e-4, 1e-4, "2e-4"), (0, 1e-4, "0"), (0.5, 0.5, "0.5")]
)
def test_a_tick_has_the_digits_its_step_needs(tick, step, label):
    assert tick_label(tick, step) == label


def test_a_line_chart_draws_every_point_and_names_both_axes():
    svg = line_of([(1, 2.0), (2, 1.0), (3, 0.5)])
    (line,) = of_class(svg, "polyline", "line")
    assert len(line.get("points").split()) == 3
    words = [element.text for element in parsed(svg).iter("text")]
    assert {"step", "loss", "0", "2"} <= set(words)


def test_a_lower_loss_is_drawn_lower():
    (line,) = of_class(line_of([(1, 2.0), (2, 0.5)]), "polyline", "line")
    (first, last) = ([float(part) for part in point.split(",")] for point in line.get("points").split())
    assert first[0] < last[0]
    assert first[1] < last[1]  # SVG's y grows downwards


@pytest.mark.parametrize("hole", [math.nan, math.inf, None])
def test_a_value_that_is_not_finite_breaks_the_line_and_is_said(hole):
    svg = line_of([(1, 2.0), (2, 1.5), (3, hole), (4, 1.0), (5, 0.5)])
    assert len(of_class(svg, "polyline", "line")) == 2
    assert "1 value not finite" in parsed(svg).get("aria-label")
    assert "nan" not in svg.lower().replace("finite", "")
    assert ",inf" not in svg


def test_an_empty_series_says_not_measured():
    assert "NOT MEASURED (no points)" in line_of([])
    assert "NOT MEASURED (2 values are not finite)" in line_of([(1, math.nan), (2, None)])
    assert "NOT MEASURED" in interval_chart([Interval("a", None, None, None, "NOT MEASURED")], name="x")
    assert "NOT MEASURED" in interval_chart([], name="x")
    assert "NOT MEASURED" in bar_chart([], name="x")


def test_validation_points_have_dots_and_training_points_have_none():
    assert len(of_class(line_of([(1, 2.0), (2, 1.0)], "validation"), "circle", "point")) == 2
    assert not of_class(line_of([(1, 2.0), (2, 1.0)]), "circle", "point")
    assert len(of_class(line_of([(1, 2.0)]), "circle", "point")) == 1  # a lone point has no line to be seen by


def test_an_interval_chart_places_dot_and_whisker_by_value():
    rows = [
        Interval("few", 0.1, 0.05, 0.15, "10%"),
        Interval("tuned", 0.7, 0.6, 0.8, "70%", accent=True),
        Interval("none", None, None, None, "NOT MEASURED"),
    ]
    svg = interval_chart(rows, name="Exact match", share=True)
    dots = [float(dot.get("cx")) for dot in of_class(svg, "circle", "dot")]
    width = 300 - 10
    assert dots == pytest.approx([5 + 0.1 * width, 5 + 0.7 * width], abs=0.06)
    whiskers = [line for line in of_class(svg, "line", "whisker") if line.get("y1") == line.get("y2")]
    assert [(float(line.get("x1")), float(line.get("x2"))) for line in whiskers] == [
        pytest.approx((5 + low * width, 5 + high * width), abs=0.06) for low, high in ((0.05, 0.15), (0.6, 0.8))
    ]
    assert "tuned: 70%" in parsed(svg).get("aria-label")
    assert "none: NOT MEASURED" in parsed(svg).get("aria-label")


def test_a_value_without_an_interval_has_no_whisker():
    assert not of_class(interval_chart([Interval("a", 0.5, None, None, "50%")], name="x", share=True), "line", "whisker")


def test_bars_are_as_long_as_their_values():
    svg = bar_chart([Bar("total", 100, "100"), Bar("supervised", 25, "25"), Bar("shared", None, "NOT MEASURED")], name="Tokens")
    widths = [float(bar.get("width")) for bar in of_class(svg, "rect", "bar")]
    assert len(widths) == 2
    assert widths[1] / widths[0] == pytest.approx(0.25, abs=0.001)


def test_thinning_keeps_ends_peaks_and_order():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[5_000] = (5_000.0, 9.0)
    points[7_001] = (7_001.0, -9.0)
    kept = thin(points, 200)
    assert len(kept) <= 200
    assert {points[0], points[-1], (5_000.0, 9.0), (7_001.0, -9.0)} <= set(kept)
    assert kept == sorted(kept)


def test_labels_are_escaped():
    svg = bar_chart([Bar("<script>x</script>", 1, '"><img src=x>')], name="' onload='x")
    assert "<script" not in svg
    assert "<img" not in svg
    assert parsed(svg).attrib.keys() == {"class", "viewBox", "role", "aria-label"}


def test_a_long_label_is_cut_before_it_meets_the_note():
    row = Interval("a candidate with a very long name indeed", 0.5, 0.4, 0.6, "50.0% (40.0 to 60.0), n 150")
    label, note = [element.text for element in parsed(interval_chart([row], name="x", share=True)).iter("text")][:2]
    assert label.endswith("…")
    assert len(label) + len(note) <= 300 / 6


@pytest.mark.parametrize(("values", "top"), [([1.0, 1.0], 1.0), ([0.0, 0.0], 1.0), ([0.2, 0.97], 1.0), ([0.2, 1.5], 1.5)])
def test_the_axis_of_a_share_ends_at_one(values, top):
    svg = line_chart([Line("share", list(enumerate(values)))], name="n", x_label="step", y_label="share", share=True)
    ticks = [float(one.text) for one in of_class(svg, "text", "tick") if one.get("text-anchor") == "end" and one.get("x") == "39"]
    assert max(ticks) == top
    assert min(ticks) == 0
