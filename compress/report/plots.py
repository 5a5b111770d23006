"""Small plots as SVG text: lines and points on plain axes, coloured by the style sheet around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 16, 42


@dataclass(frozen=True)
class Line:
    """A curve: y over x, with the CSS class that colours it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    css: str
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """A marker with a label beside it, an optional 95 % interval in y, and the CSS class that colours it."""

    name: str
    x: float
    y: float
    css: str
    hollow: bool = False
    interval: tuple[float, float] | None = None


class Axis:
    """Maps numbers to pixels and chooses round ticks.

    Args:
        values: what must fit.
        start: pixel of the smallest.
        stop: pixel of the largest.
        scale: `log` needs positive values.
    """

    def __init__(
        self, values: Sequence[float], start: float, stop: float, scale: Literal["linear", "log"] = "linear"
    ) -> None:
        self._log = scale == "log"
        low, high = min(values), max(values)
        if self._log:
            low, high = math.log10(low), math.log10(high)
        margin = 0.06 * (high - low) or max(abs(low) * 0.05, 1e-3)
        self._low, self._high = low - margin, high + margin
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        at = math.log10(value) if self._log else value
        return self._start + (at - self._low) / (self._high - self._low) * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Return three to eight round values inside the axis."""
        if not self._log:
            return _round_values(self._low, self._high)
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            ticks = [d * 10.0**k for k in decades for d in digits if self._low <= math.log10(d * 10.0**k) <= self._high]
            if len(ticks) >= 3:
                return ticks
        return _round_values(10**self._low, 10**self._high)


def _round_values(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def lines(
    curves: Sequence[Line], x_label: str, y_label: str, y_scale: Literal["linear", "log"] = "linear", title: str = ""
) -> str:
    """Draw curves, each labelled at its end."""
    x = Axis([v for curve in curves for v in curve.x], _LEFT, WIDTH - _RIGHT)
    y = Axis([v for curve in curves for v in curve.y], HEIGHT - _BOTTOM, _TOP, y_scale)
    body = [_frame(x, y, x_label, y_label)]
    for curve in curves:
        places = [(x(a), y(b)) for a, b in zip(curve.x, curve.y, strict=True)]
        path = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        body.append(f'<path class="line {curve.css}" d="{path}"{dash}/>')
        for (a, b), value, at in zip(places, curve.y, curve.x, strict=True):
            hint = f"{curve.name}, {x_label} {_number(at)}: {_number(value)}"
            body.append(f'<circle class="dot {curve.css}" cx="{a:.1f}" cy="{b:.1f}" r="2.2">{_title(hint)}</circle>')
    return _svg(body, title)


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    x_values: Sequence[float] = (),
    percent: bool = False,
    title: str = "",
) -> str:
    """Draw labelled points over a logarithmic x; labels are put where they cover nothing.

    Args:
        points: x positive.
        x_label: under the plot.
        y_label: above the plot.
        x_values: further values that the x axis must span, to make plots comparable.
        percent: y values are shares.
        title: for screen readers.
    """
    x = Axis([*(point.x for point in points), *x_values], _LEFT + 12, WIDTH - _RIGHT - 12, "log")
    ends = [end for point in points for end in (point.interval or (point.y, point.y))]
    y = Axis([*ends, *(point.y for point in points)], HEIGHT - _BOTTOM - 8, _TOP + 10)
    body = [_frame(x, y, x_label, y_label, percent)]
    taken = [_Box(x(point.x) - 6, y(point.y) - 6, x(point.x) + 6, y(point.y) + 6) for point in points]
    for point in sorted(points, key=lambda point: point.hollow):
        a, b = x(point.x), y(point.y)
        if point.interval is not None:
            low, high = (y(end) for end in point.interval)
            body.append(f'<path class="whisker {point.css}" d="M{a:.1f} {low:.1f}V{high:.1f}"/>')
        value = f"{100 * point.y:.1f} %" if percent else _number(point.y)
        hint = _title(f"{point.name}: {_number(point.x)} ms, {value}")
        kind = "hollow" if point.hollow else "solid"
        body.append(f'<circle class="mark {kind} {point.css}" cx="{a:.1f}" cy="{b:.1f}" r="5">{hint}</circle>')
        box, anchor = min(_places(point.name, a, b), key=lambda place: _cost(place, b, taken))
        taken.append(box)
        at = {"start": box.left, "end": box.right, "middle": a}[anchor]
        place = f'x="{at:.1f}" y="{box.bottom - 2:.1f}" text-anchor="{anchor}"'
        body.append(f'<text class="label" {place}>{escape(point.name)}</text>')
    return _svg(body, title)


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        """The common area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def _places(name: str, a: float, b: float) -> Iterator[tuple[_Box, str]]:
    """Yield the places for a label around its point."""
    width = 6.4 * len(name)
    for baseline in (b + 4, b - 10, b + 18, b - 24, b + 32, b - 38):
        for anchor, left in (("start", a + 9), ("end", a - 9 - width), ("middle", a - width / 2)):
            yield _Box(left, baseline - 11, left + width, baseline + 2), anchor


def _cost(place: tuple[_Box, str], b: float, taken: Sequence[_Box]) -> float:
    box, anchor = place
    outside = max(0.0, _LEFT - box.left) + max(0.0, box.right - WIDTH)
    outside += max(0.0, _TOP - box.top) + max(0.0, box.bottom - (HEIGHT - _BOTTOM))
    covered = sum(box.overlap(other) for other in taken)
    return 1000 * outside + 100 * covered + abs(box.bottom - 6 - b) + 3 * (anchor == "end") + 6 * (anchor == "middle")


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, percent: bool = False) -> str:
    parts = []
    for value in y.ticks():
        text = f"{100 * value:.4g} %" if percent else _number(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    for value in x.ticks():
        parts.append(f'<path class="notch" d="M{x(value):.1f} {HEIGHT - _BOTTOM}v4"/>')
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
            f"{_number(value)}</text>"
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    parts.append(
        f'<text class="name" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    parts.append(f'<text class="name" x="2" y="10">{escape(y_label)}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(body: Sequence[str], title: str) -> str:
    label = f' role="img" aria-label="{escape(title)}"' if title else ""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}"{label}>{"".join(body)}</svg>'
