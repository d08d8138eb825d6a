"""Charts as pure functions: takes numbers and labels, gives an SVG string, without scripts, styles or references.

Charts are 300 (intervals) or 360 units wide, so that their text is readable on a phone and not too large on a desk; colours
come from the page's style sheet by class name. Labels are escaped here (`Markup.format`), so an SVG string may stand in a page
as it is. A chart without a single finite value says NOT MEASURED.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup

from ._words import NOT_MEASURED, plain

WIDTH = 360
INTERVAL_WIDTH = 300  # three stand side by side on a desk
_MARGIN = 1
# The width of a letter of the page's 11-unit type, so that a row's label and note never meet.
_LETTER = 6.2
# Beyond this a line has more points than the chart has pixels.
_MOST_POINTS = 300


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart; `value` None means that it was not measured."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    note: str
    """What stands at the right: the value, its interval and n."""
    accent: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a line chart: points (x, y) by rising x; a y of None or NaN breaks the line."""

    label: str
    points: Sequence[tuple[float, float | None]]
    kind: str = "train"
    """`train`: thin and grey; `validation`: accent with a dot at each point; `rate`: accent without dots; `limit`: dashed."""


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart; `value` None means that it was not measured."""

    label: str
    value: float | None
    note: str
    accent: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose low and high.

    >>> nice_ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high < low:
        low, high = high, low
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        spread = abs(high) * 0.5 or 1.0
        low, high = (0.0, 2 * high) if high > 0 else (low - spread, high + spread)
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def tick_label(tick: float, step: float) -> str:
    """A tick as text with the digits its step needs: 0.25, 1,000, 5e-04."""
    if tick == 0:
        return "0"
    if abs(step) < 1e-3:
        mantissa, exponent = f"{tick:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += round(step * 10**digits, 9) != round(step * 10**digits)
    return f"{tick:,.{digits}f}"


def interval_chart(rows: Sequence[Interval], *, name: str, share: bool = False) -> Markup:
    """A dot and a whisker for each row on one axis; `share` fixes the axis to 0 to 100%.

    A row has its label and note above its whisker, so that long names fit a narrow screen.
    """
    edges = [edge for row in rows for edge in (row.value, row.low, row.high) if _finite(edge)]
    if not edges:
        return _empty(f"{name}: {NOT_MEASURED}")
    ticks = nice_ticks(0, 1, 4) if share and min(edges) >= 0 and max(edges) <= 1 else nice_ticks(min(0.0, *edges), max(edges), 4)
    row_height, top = 38, 4
    bottom = top + row_height * len(rows)
    at = _scale(ticks[0], ticks[-1], _MARGIN + 4, INTERVAL_WIDTH - _MARGIN - 4)
    parts = [_line(at(tick), top, at(tick), bottom, "grid") for tick in ticks]
    for index, row in enumerate(rows):
        parts.append(_interval_row(row, at, top + index * row_height))
    step = ticks[1] - ticks[0]
    for tick in ticks:
        label = f"{100 * tick:.0f}%" if share else tick_label(tick, step)
        anchor = "start" if tick == ticks[0] else "end" if tick == ticks[-1] else "middle"
        parts.append(_text(at(tick), bottom + 13, label, "tick", anchor))
    said = "; ".join(f"{row.label}: {row.note}" for row in rows)
    return _svg(bottom + 18, f"{name}, value and interval. {said}", parts, INTERVAL_WIDTH)


def _interval_row(row: Interval, at: Callable[[float], float], y: float) -> Markup:
    kind = " accent" if row.accent else ""
    parts = _heading(row.label, row.note, y + 13, kind, INTERVAL_WIDTH)
    middle = y + 24
    if _finite(row.low) and _finite(row.high):
        parts.append(_line(at(row.low), middle, at(row.high), middle, "whisker" + kind))
        parts.extend(_line(at(end), middle - 4, at(end), middle + 4, "whisker" + kind) for end in (row.low, row.high))
    if _finite(row.value):
        parts.append(Markup('<circle class="dot{}" cx="{}" cy="{}" r="4.5"/>').format(kind, _f(at(row.value)), _f(middle)))
    return Markup("").join(parts)


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    most: int = _MOST_POINTS,
    share: bool = False,
) -> Markup:
    """Lines over one pair of axes with round ticks; `marks` are upright dashed lines at an x, each with a word.

    Points that are not finite break their line and are counted in the chart's description. Of a line at most `most` points are drawn.
    The axis of a `share` stays within 0 and 1.
    """
    finite = [(x, y) for line in lines for x, y in line.points if _finite(x) and _finite(y)]
    lost = sum(not _finite(y) for line in lines for _, y in line.points)
    if not finite:
        return _empty(f"{name}: {NOT_MEASURED}" + (f" ({lost} values are not finite)" if lost else " (no points)"))
    y_ticks = _y_ticks([y for _, y in finite], share)
    x_ticks = nice_ticks(min(0.0, *(x for x, _ in finite)), max(x for x, _ in finite), 4)
    left, right, top, bottom = 44, WIDTH - _MARGIN - 4, 22, 190
    last_x = max(x for x, _ in finite)
    at_x, at_y = _scale(x_ticks[0], max(last_x, x_ticks[0] + 1e-9), left, right), _scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [_text(_MARGIN, 11, y_label, "tick")]
    for tick in y_ticks:
        parts += [_line(left, at_y(tick), right, at_y(tick), "grid")]
        parts += [_text(left - 5, at_y(tick) + 3.5, tick_label(tick, y_ticks[1] - y_ticks[0]), "tick", "end")]
    for tick in x_ticks:
        if tick <= last_x * (1 + 1e-9):
            anchor = "end" if at_x(tick) > right - 8 else "middle"
            parts += [_line(at_x(tick), bottom, at_x(tick), bottom + 4, "axis")]
            parts += [_text(at_x(tick), bottom + 15, tick_label(tick, x_ticks[1] - x_ticks[0]), "tick", anchor)]
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_text((left + right) / 2, bottom + 29, x_label, "tick", "middle"))
    for x, word in marks:
        if x_ticks[0] <= x <= last_x:
            parts += [_line(at_x(x), top, at_x(x), bottom, "mark"), _text(at_x(x) - 3, top + 9, word, "tick", "end")]
    parts += [_draw(line, at_x, at_y, most) for line in lines]
    return _svg(bottom + 34, _described(name, x_label, lines, lost), parts)


def _y_ticks(values: Sequence[float], share: bool) -> list[float]:
    low, high = min(values), max(values)
    if not share or low < 0 or high > 1:
        return nice_ticks(_floor(values), high, 4)
    return nice_ticks(0, 1, 4) if low == high else [tick for tick in nice_ticks(_floor(values), high, 4) if 0 <= tick <= 1]


def _described(name: str, x_label: str, lines: Sequence[Line], lost: int) -> str:
    said = []
    for line in lines:
        known = [(x, y) for x, y in line.points if _finite(y)]
        if known:
            last = f"{plain(known[-1][1])} at {plain(known[-1][0])}, {len(known)} points" if len(known) > 1 else "1 point"
            said.append(f"{line.label}: {plain(known[0][1])} at {x_label} {plain(known[0][0])}, {last}")
    missing = f". {lost} value{'' if lost == 1 else 's'} not finite and not drawn" if lost else ""
    return f"{name}. {'; '.join(said)}{missing}"


def _draw(line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float], most: int) -> Markup:
    parts, pieces = [], _pieces(line.points)
    for piece in pieces:
        shown = thin(piece, most)
        path = " ".join(f"{_f(at_x(x))},{_f(at_y(y))}" for x, y in shown)
        if len(shown) > 1:
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(line.kind, path))
        if len(shown) == 1 or line.kind == "validation":
            parts += [
                Markup('<circle class="point {}" cx="{}" cy="{}" r="3"/>').format(line.kind, _f(at_x(x)), _f(at_y(y))) for x, y in shown
            ]
    return Markup("").join(parts)


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if _finite(x) and _finite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def thin(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` of the points: the first, the last, and the lowest and highest of each stretch between, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    inner, stretches = points[1:-1], max(1, (most - 2) // 2)
    kept = [points[0]]
    for index in range(stretches):
        stretch = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}, key=lambda point: point[0])
    return [*kept, points[-1]]


def bar_chart(bars: Sequence[Bar], *, name: str) -> Markup:
    """A horizontal bar for each row from zero, all on one scale, each with its label and its note above it."""
    known = [bar.value for bar in bars if _finite(bar.value) and bar.value >= 0]
    if not known:
        return _empty(f"{name}: {NOT_MEASURED}")
    row_height, top, longest = 34, 2, max(known) or 1.0
    parts = []
    for index, bar in enumerate(bars):
        y, kind = top + index * row_height, " accent" if bar.accent else ""
        parts += _heading(bar.label, bar.note, y + 12, kind, WIDTH)
        parts.append(_rect(y + 18, WIDTH - 2 * _MARGIN, "track"))
        if _finite(bar.value) and bar.value > 0:
            parts.append(_rect(y + 18, max(1.5, (WIDTH - 2 * _MARGIN) * bar.value / longest), "bar" + kind))
    said = "; ".join(f"{bar.label}: {bar.note}" for bar in bars)
    return _svg(top + row_height * len(bars), f"{name}. {said}", parts)


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _floor(values: Sequence[float]) -> float:
    """Where an axis starts: at zero, unless the values lie far from it in a narrow band."""
    low, high = min(values), max(values)
    return low if low < 0 or low > 0.6 * high else 0.0


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1.0)


def _f(coordinate: float) -> str:
    return f"{coordinate:.1f}".removesuffix(".0")


def _heading(label: str, note: str, y: float, kind: str, width: float) -> list[Markup]:
    """A row's label at the left and its note at the right, the label cut so that they never meet."""
    note = _cut(note, 36)
    label = _cut(label, max(4, int(width / _LETTER) - len(note) - 1))
    return [_text(_MARGIN, y, label, "label" + kind), _text(width - _MARGIN, y, note, "note" + kind, "end")]


def _cut(words: str, letters: int) -> str:
    return words if len(words) <= letters else words[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, _f(x1), _f(y1), _f(x2), _f(y2))


def _rect(y: float, width: float, kind: str) -> Markup:
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="9" rx="2"/>').format(kind, _MARGIN, _f(y), _f(width))


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, _f(x), _f(y), anchor, _cut(words, 56))


def _svg(height: float, description: str, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, _f(height), description, Markup("").join(parts)
    )


def _empty(words: str) -> Markup:
    return _svg(28, words, [_text(_MARGIN, 18, words, "note")])
