"""Curves over steps as SVG paths and tick labels in percent; `chart.html` draws them, here and in the training report.

Invariant: pure, and independent of size: a path lives in a box of 1000 x 1000 that the page stretches, so no text is in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BOX = 1000
POINTS = 600
"""Most points of a line; longer runs show means over equal runs of steps."""
SMOOTH = 20
"""A running mean spans one in this many of the points."""


@dataclass(frozen=True)
class Series:
    """One quantity over steps; weights make means exact (a loss weighs as many tokens as it was over)."""

    name: str
    color: str
    steps: list[int]
    values: list[float]
    weights: list[float]


@dataclass(frozen=True)
class Curve:
    """A series as it is drawn."""

    name: str
    color: str
    faint: str
    bold: str


@dataclass(frozen=True)
class Chart:
    """One panel."""

    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    """(percent from the left, label)."""
    y_ticks: list[tuple[float, str]]
    """(percent from the top, label)."""
    points: list[dict[str, Any]]
    """What a tooltip reads: per curve its name, colour, x and y."""
    span: int
    """Steps that a point is the mean of."""
    last: int
    """Step at the right edge; the left edge is 0."""


def draw(lines: Sequence[Series], *, smooth: bool, zero: bool = False, x_count: int = 6, y_count: int = 4) -> Chart | None:
    """The panel of some series, or None where none has a point.

    Args:
        lines: what is drawn, on one scale.
        smooth: whether a running mean is drawn boldly over the points.
        zero: whether the scale begins at zero.
        x_count: about how many labels the steps get.
        y_count: about how many labels the values get.
    """
    lines = [line for line in lines if line.values]
    if not lines:
        return None
    last = max(line.steps[-1] for line in lines)
    span = math.ceil(max(len(line.steps) for line in lines) / POINTS)
    thinned = [thin(line, span) for line in lines]
    bold = [running_mean(line) if smooth else line.values for line in thinned]
    low, high = min(min(b) for b in bold), max(max(b) for b in bold)
    low = 0.0 if zero else low
    margin = (high - low or abs(high) or 1.0) * 0.06
    low, high = (low if zero else low - margin), high + margin

    def path(steps: list[int], values: list[float]) -> str:
        return "M" + "L".join(f"{BOX * s / last:.1f} {BOX * (high - v) / (high - low):.1f}" for s, v in zip(steps, values, strict=True))

    curves = [
        Curve(line.name, line.color, path(line.steps, line.values) if smooth else "", path(line.steps, mean))
        for line, mean in zip(thinned, bold, strict=True)
    ]
    points = [{"n": line.name, "c": line.color, "x": line.steps, "y": [float(f"{v:.4g}") for v in line.values]} for line in thinned]
    x_ticks = [(100 * t / last, f"{t:,.0f}") for t in nice_ticks(0, last, x_count) if t == round(t)]
    y_ticks = [(100 * (high - t) / (high - low), number(t)) for t in nice_ticks(low, high, y_count)]
    return Chart(curves, x_ticks, y_ticks, points, span, last)


def thin(line: Series, span: int) -> Series:
    """Weighted means over runs of `span` points, placed at the last of them."""
    if span == 1:
        return line
    runs = [slice(first, first + span) for first in range(0, len(line.steps), span)]
    weights = [sum(line.weights[run]) for run in runs]
    values = [_mean(line.values[run], line.weights[run]) for run in runs]
    return Series(line.name, line.color, [line.steps[run][-1] for run in runs], values, weights)


def running_mean(line: Series) -> list[float]:
    """Weighted mean over a window around each point, narrower at the ends so that it stays centred."""
    count = len(line.values)
    half = count // (2 * SMOOTH)
    means = []
    for i in range(count):
        reach = min(half, i, count - 1 - i)
        window = slice(i - reach, i + reach + 1)
        means.append(_mean(line.values[window], line.weights[window]))
    return means


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within the limits, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short label."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 1e4:
        return f"{value / 1e3:,.4g}k"
    return f"{value:,.4g}"


def _mean(values: list[float], weights: list[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else sum(values) / len(values)
