"""Histograms as one picture that needs nothing else: an SVG file, or a page that holds it.

Invariant: what is written loads nothing, and every bar tells its range and count to those who point at it.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import UserError

_WIDTH, _HEIGHT = 300, 120
"""Pixels of a chart's bars."""
_GAP, _HEAD, _FOOT = 40, 34, 26
"""Pixels between charts, above the bars for the title, below them for the range."""


class Histogram(NamedTuple):
    """One chart."""

    title: str
    bins: list[tuple[int, int, int]]
    """(first, last, count), in order."""


def write_plot(path: Path, charts: Mapping[str, Sequence[Histogram]]) -> None:
    """Writes a row of charts for each name, as .svg or .html.

    Raises:
        UserError: the name ends otherwise, or the file cannot be written.
    """
    if path.suffix not in (".svg", ".html"):
        raise UserError(f"--plot {path} is neither .svg nor .html (give a name that ends so)")
    picture = _svg(charts)
    if path.suffix == ".html":
        picture = f'<!doctype html><meta charset="utf-8"><title>xc-data stats</title><body>{picture}</body>\n'
    try:
        path.write_text(picture)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror} (choose another place: --plot)") from None


def _svg(charts: Mapping[str, Sequence[Histogram]]) -> str:
    columns = max(len(row) for row in charts.values())
    row_height = 24 + _HEAD + _HEIGHT + _FOOT
    size = f"{columns * (_WIDTH + _GAP) + _GAP} {len(charts) * row_height + _GAP}"
    width, height = size.split()
    parts = []
    for number, (name, row) in enumerate(charts.items()):
        top = number * row_height + _GAP // 2
        parts.append(f'<text x="{_GAP}" y="{top + 14}" font-weight="bold">{escape(name)}</text>')
        parts += [_chart(chart, _GAP + i * (_WIDTH + _GAP), top + 24) for i, chart in enumerate(row)]
    style = 'font-family="system-ui, sans-serif" font-size="12"'
    box = f'width="{width}" height="{height}" viewBox="0 0 {size}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style}>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


def _chart(chart: Histogram, left: int, top: int) -> str:
    most, step = max(count for _, _, count in chart.bins), _WIDTH / len(chart.bins)
    base = top + _HEAD + _HEIGHT
    parts = [f'<text x="{left}" y="{top + 14}">{escape(chart.title)}</text>']
    parts.append(f'<text x="{left + _WIDTH}" y="{top + 14}" text-anchor="end" fill="gray">highest {most:,}</text>')
    for i, (first, last, count) in enumerate(chart.bins):
        height = count / most * _HEIGHT
        label = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        place = f'x="{left + i * step:.1f}" y="{base - height:.1f}" width="{max(1.0, step - 1):.1f}" height="{height:.1f}"'
        parts.append(f'<rect {place} fill="#3b76af"><title>{label}: {count:,}</title></rect>')
    parts.append(f'<text x="{left}" y="{base + 16}" fill="gray">{chart.bins[0][0]:,}</text>')
    parts.append(f'<text x="{left + _WIDTH}" y="{base + 16}" text-anchor="end" fill="gray">{chart.bins[-1][1]:,}</text>')
    return "\n".join(parts)
