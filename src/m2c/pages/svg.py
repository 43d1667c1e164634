"""Charts as inline SVG: lines and stacked bars, with axes, units and a legend.

Colours are classes of the page's style sheet, so that light and dark are its business. Takes
numbers and words, escapes the words, and knows nothing about models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from m2c.pages.html import escape

_WIDTH: Final = 480
_HEIGHT: Final = 288
_LEFT: Final = 52
_RIGHT: Final = 16
_TOP: Final = 28
_BOTTOM: Final = 46
_DOTS: Final = 40  # points up to which each is drawn, with its value to point at
_MOST_POINTS: Final = 400
COLOURS: Final = 8


@dataclass(frozen=True)
class Line:
    """One curve; xs ascending, as many as ys."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """label: what, and in which unit. high: at least this is shown; log: powers of ten."""

    label: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False


@dataclass(frozen=True)
class Bar:
    """A row of parts laid end to end. room: what they could fill, or 0."""

    label: str
    parts: Mapping[str, float]
    words: str
    room: float = 0.0


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, *, title: str) -> str:
    """Curves over two axes, with a legend if there is more than one."""
    kept = [_thin(line) for line in lines if len(line.xs)]
    to_x = _Scale(x, [v for line in kept for v in line.xs], _LEFT, _WIDTH - _RIGHT)
    to_y = _Scale(y, [v for line in kept for v in line.ys], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_y_axis(to_y), *_x_axis(to_x, _HEIGHT - _BOTTOM, _HEIGHT - 8)]
    parts.append(f'<text class="label" x="2" y="13">{escape(y.label)}</text>')
    for i, line in enumerate(kept):
        parts += _curve(i, line, to_x, to_y)
    legend = _legend([line.name for line in kept], "line") if len(kept) > 1 else ""
    return _svg(_HEIGHT, parts, title) + legend


def bar_chart(bars: Sequence[Bar], axis: Axis, *, title: str) -> str:
    """Rows of stacked parts over one axis; each part keeps its colour from row to row."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    ends = [max(sum(bar.parts.values()), bar.room) for bar in bars]
    scale = _Scale(axis, ends, 2, _WIDTH - _RIGHT)
    parts, top = [], 4
    bottom = 4 + 46 * len(bars)
    axis_parts = _x_axis(scale, bottom, bottom + 38, top)
    for bar in bars:
        parts.append(f'<text class="name" x="2" y="{top + 13}">{escape(bar.label)}</text>')
        parts.append(
            f'<text class="value" x="{_WIDTH - _RIGHT}" y="{top + 13}">{escape(bar.words)}</text>'
        )
        parts += _row(bar, names, scale, top + 19)
        top += 46
    legend = _legend(names, "box") if len(names) > 1 else ""
    return _svg(bottom + 46, [*axis_parts, *parts], title) + legend


def share_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, four to seven of them."""
    if high <= low:
        return [low]
    raw = (high - low) / 6
    base = 10.0 ** math.floor(math.log10(raw))
    step = base * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * base >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


class _Scale:
    """From a value to a place on paper. The axis ends at a round number."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis = axis
        self.start, self.end = start, end
        if axis.log:
            kept = [v for v in values if v > 0] or [1.0]
            self.low = float(math.floor(math.log10(min(kept))))
            self.high = max(self.low + 1, float(math.ceil(math.log10(max(kept)))))
            self.ticks = [10.0**i for i in range(int(self.low), int(self.high) + 1)]
            return
        self.low = axis.low
        highest = max([axis.high, *values]) if values else axis.high
        if highest <= self.low:
            highest = self.low + 1
        self.ticks = share_ticks(self.low, highest)
        if not axis.high and self.ticks[-1] < highest:
            self.ticks.append(self.ticks[-1] + self.ticks[1] - self.ticks[0])
        self.high = max(highest if axis.high else 0.0, self.ticks[-1])

    def __call__(self, value: float) -> float:
        if self.axis.log:
            value = math.log10(max(value, 10.0**self.low))
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _thin(line: Line) -> Line:
    """At most _MOST_POINTS points: each the mean of its neighbours."""
    count = len(line.xs)
    if count <= _MOST_POINTS:
        return line
    edges = [i * count // _MOST_POINTS for i in range(_MOST_POINTS + 1)]
    pairs = list(pairwise(edges))
    xs = [sum(line.xs[a:b]) / (b - a) for a, b in pairs]
    return Line(line.name, xs, [sum(line.ys[a:b]) / (b - a) for a, b in pairs])


def _curve(i: int, line: Line, to_x: _Scale, to_y: _Scale) -> list[str]:
    colour = i % COLOURS + 1
    places = [(to_x(a), to_y(b)) for a, b in zip(line.xs, line.ys, strict=True)]
    path = " ".join(f"{a:g},{b:g}" for a, b in places)
    parts = [f'<polyline class="s{colour}" points="{path}"><title>{escape(line.name)}</title>']
    parts.append("</polyline>")
    if len(places) <= _DOTS:
        for (a, b), u, v in zip(places, line.xs, line.ys, strict=True):
            words = f"{line.name}: {number(v)} at {number(u)}"
            parts.append(f'<circle class="f{colour}" cx="{a:g}" cy="{b:g}" r="2.2">')
            parts.append(f"<title>{escape(words)}</title></circle>")
    return parts


def _row(bar: Bar, names: Sequence[str], scale: _Scale, top: float) -> list[str]:
    end = scale(max(bar.room, sum(bar.parts.values())))
    parts = [f'<rect class="room" x="2" y="{top}" width="{end - 2:g}" height="18"/>']
    at = 0.0
    for name, value in bar.parts.items():
        left, right = scale(at), scale(at + value)
        at += value
        if right - left >= 0.5:
            colour = names.index(name) % COLOURS + 1
            parts.append(
                f'<rect class="f{colour}" x="{left:g}" y="{top}" width="{right - left:g}" '
                f'height="18"><title>{escape(f"{name}: {number(value)}")}</title></rect>'
            )
    return parts


def _y_axis(scale: _Scale) -> list[str]:
    parts = []
    for tick in scale.ticks:
        y = scale(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4}">{number(tick)}</text>')
    return parts


def _x_axis(scale: _Scale, bottom: float, label_y: float, top: float = _TOP) -> list[str]:
    middle = (scale.start + scale.end) / 2
    parts = [
        f'<line class="axis" x1="{scale.start}" x2="{scale.end}" y1="{bottom}" y2="{bottom}"/>',
        f'<text class="label middle" x="{middle}" y="{label_y}">{escape(scale.axis.label)}</text>',
    ]
    for tick in scale.ticks:
        x = scale(tick)
        place = "middle" if x - 12 > 2 else "start"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick {place}" x="{x}" y="{bottom + 17}">{number(tick)}</text>')
    return parts


def _svg(height: float, parts: list[str], title: str) -> str:
    words = escape(title)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{words}">'
        f"{''.join(parts)}</svg>"
    )


def _legend(names: Sequence[str], kind: str) -> str:
    items = []
    for i, name in enumerate(names):
        colour = i % COLOURS + 1
        key = f'<line class="s{colour}" x1="0" x2="22" y1="6" y2="6"/>'
        if kind == "box":
            key = f'<rect class="f{colour}" x="5" y="0" width="12" height="12"/>'
        drawn = f'<svg class="key" viewBox="0 0 22 12" aria-hidden="true">{key}</svg>'
        items.append(f"<li>{drawn}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def number(value: float) -> str:
    """Three digits that mean something."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if abs(value) >= 1000 else f"{float(f'{value:.3g}'):g}"
