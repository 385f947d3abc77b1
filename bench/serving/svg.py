"""Charts as SVG text, coloured by the page's style sheet: ``.s0``, ``.s1``, ``.axis``, ``.mark``.

No script and no outside resource: a chart is readable wherever the page goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 26, 40
FEW = 30  # points: of a line through fewer each is seen


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y), joined by lines or not."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across the chart at one value of x or of y."""

    label: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """What to draw. Both axes begin at zero; ``y_max`` is None for the data's own."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Mark] = ()
    y_max: float | None = None

    def svg(self) -> str:
        """The element. Without points it says so."""
        points = [point for series in self.series for point in series.points]
        x_ticks = ticks(max((x for x, _ in points), default=1.0))
        y_ticks = ticks(self.y_max or max((y for _, y in points), default=1.0))
        x_end, y_end = x_ticks[-1] or 1.0, y_ticks[-1] or 1.0

        def at_x(value: float) -> float:
            return LEFT + (WIDTH - LEFT - RIGHT) * value / x_end

        def at_y(value: float) -> float:
            return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / y_end

        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">',
            f'<text class="title" x="{LEFT}" y="16">{escape(self.title)}</text>',
        ]
        for tick in y_ticks:
            y = at_y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
        for tick in x_ticks:
            parts.append(_text(at_x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{at_y(0):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.x_label, "middle"))
        parts.append(
            f'<text transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
            f' text-anchor="middle">{escape(self.y_label)}</text>'
        )
        for mark in self.marks:
            if mark.x is not None and mark.x <= x_end:
                x = at_x(mark.x)
                parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{at_y(0):.1f}"/>')
                parts.append(_text(x + 4, HEIGHT - BOTTOM - 6, mark.label, "start"))
            if mark.y is not None and mark.y <= y_end:
                y = at_y(mark.y)
                parts.append(f'<path class="mark" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
                parts.append(_text(WIDTH - RIGHT - 4, y - 4, mark.label, "end"))
        for number, series in enumerate(self.series):
            places = [(at_x(x), at_y(min(y, y_end))) for x, y in series.points]
            parts.append(_drawn(number, series.joined, places))
        if not points:
            parts.append(_text(WIDTH / 2, HEIGHT / 2, "nothing measured", "middle"))
        parts.append(self._legend())
        return "".join(parts) + "</svg>"

    def _legend(self) -> str:
        """One text, so that the browser, which knows how wide letters are, sets it."""
        if len(self.series) < 2:
            return ""
        names = (
            f'\u00a0\u00a0\u00a0<tspan class="dot s{number}">\u25cf</tspan> {escape(series.name)}'
            for number, series in enumerate(self.series)
        )
        return f'<text x="{WIDTH - RIGHT}" y="16" text-anchor="end">{"".join(names)}</text>'


def ticks(maximum: float) -> list[float]:
    """From zero in steps of 1, 2 or 5 times a power of ten to at least ``maximum``; 3 to 7."""
    if maximum <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(maximum / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= maximum)
    return [step * index for index in range(math.ceil(maximum / step - 1e-9) + 1)]


def _drawn(number: int, joined: bool, places: Sequence[tuple[float, float]]) -> str:
    parts = []
    if joined and places:
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line s{number}" d="M{line}"/>')
    if not joined or len(places) < FEW:
        radius = 3 if joined else 2
        parts += (
            f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
            for x, y in places
        )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
