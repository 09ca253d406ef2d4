"""What sources hold, as tables on a terminal and as a picture.

Invariant: reads the merged index alone (a few columns, in chunks), so that it costs seconds for a source of any size; opens no shard.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.inspect.histograms import Histogram, write_plot
from data_pipeline.read.paths import ShardPath
from data_pipeline.samples import Kind
from data_pipeline.shards.source import ShardSource

CHUNK = 262_144
"""Samples counted at once."""
BAR = 40
"""Characters of the longest bar."""
EXAMPLES = 5
"""Damaged samples that are named."""


class Counts:
    """How often each whole number occurs."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, values: np.ndarray) -> None:
        """Counts `values`."""
        distinct, counts = np.unique(values, return_counts=True)
        self._counts.update(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))

    def __bool__(self) -> bool:
        return bool(self._counts)

    @property
    def total(self) -> int:
        """The sum of all values."""
        return sum(value * count for value, count in self._counts.items())

    def quantile(self, share: float) -> int:
        """The smallest value with at least this share of the values at or below it."""
        wanted, seen = share * self._counts.total(), 0
        for value in sorted(self._counts):
            seen += self._counts[value]
            if seen >= wanted:
                return value
        return 0

    def bins(self) -> list[tuple[int, int, int]]:
        """(first, last, count) of bins: single numbers while there are few, else powers of two; none is left out in between."""
        low, high = min(self._counts), max(self._counts)
        if high - low < 10:
            return [(v, v, self._counts[v]) for v in range(low, high + 1)]
        bins: Counter[int] = Counter()
        for value, count in self._counts.items():
            bins[value.bit_length()] += count
        return [((1 << b) >> 1, (1 << b) - 1, bins[b]) for b in range(min(bins), max(bins) + 1)]


class SourceCounts:
    """Everything that the tables show, in one pass over the columns."""

    def __init__(self, source: ShardSource) -> None:
        self.text, self.elements, self.images = Counts(), Counts(), Counts()
        self.widths, self.heights = Counts(), Counts()
        for counts, records in _chunks(source):
            sample = np.repeat(np.arange(len(counts)), counts)
            is_image = records["width"] > 0
            self.text.add(np.bincount(sample, records["tokens"], len(counts)).astype(np.int64))
            self.images.add(np.bincount(sample[is_image], minlength=len(counts)))
            self.elements.add(counts)
            self.widths.add(records["width"][is_image])
            self.heights.add(records["height"][is_image])


def print_stats(sources: Sequence[ShardPath], index_dir: Path | None, plot: Path | None = None) -> None:
    """Prints the tables of merged sources to stdout, side by side at the end if they are several.

    Args:
        sources: their folders.
        index_dir: where the index of a single source is, if not beside its shards.
        plot: an .svg or .html file for the histograms.

    Raises:
        UserError: a source is not indexed and merged, or the plot cannot be written.
    """
    console = Console(highlight=False)
    bar = "█" if console.encoding.startswith("utf") else "#"
    opened = [ShardSource(source.name, source, index_dir) for source in sources]
    charts: dict[str, list[Histogram]] = {}
    for source in opened:
        counts = SourceCounts(source)
        tables = [_facts(source, counts)]
        if source.facts.damaged:
            tables.append(_damage(source))
        tables.append(_histogram("text tokens a sample", "tokens", counts.text, bar))
        if source.kind is Kind.document:
            tables.append(_histogram("images a document", "images", counts.images, bar))
        for table in tables:
            console.print(table)
            console.print()
        charts[str(source.path)] = _charts(source, counts)
    if len(opened) > 1:
        console.print(_together(opened))
    if plot:
        write_plot(plot, charts)
        console.print(f"plot: {plot.resolve()}", soft_wrap=True)


def _charts(source: ShardSource, counts: SourceCounts) -> list[Histogram]:
    found = [Histogram("text tokens a sample", counts.text.bins())]
    if counts.widths:
        found += [Histogram("image width", counts.widths.bins()), Histogram("image height", counts.heights.bins())]
    if source.kind is Kind.document:
        found.append(Histogram("images a document", counts.images.bins()))
    return found


def _together(sources: Sequence[ShardSource]) -> Table:
    table = Table(title="together", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("source", overflow="fold")
    for column in ("samples kept", "left out", "text tokens", "share", "tokens a sample", "images"):
        table.add_column(column, justify="right")
    every = [(str(s.path), s.facts.samples, s.facts.kept, s.text_tokens, s.images) for s in sources]
    total = ("all", *(sum(column) for column in list(zip(*every, strict=True))[1:]))
    for name, samples, kept, tokens, images in [*every, total]:
        lost, share = (samples - kept) / max(1, samples), tokens / max(1, total[3])
        table.add_row(Text(name), f"{kept:,}", f"{lost:.2%}", f"{tokens:,}", f"{share:.1%}", f"{tokens / max(1, kept):,.1f}", f"{images:,}")
    return table


def _chunks(source: ShardSource) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, source.facts.kept, CHUNK):
        yield source.elements(source.kept(first, min(first + CHUNK, source.facts.kept)))


def _facts(source: ShardSource, counts: SourceCounts) -> Table:
    facts = source.facts
    lost = facts.samples - facts.kept
    table = Table(title=Text(str(source.path), "bold"), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("kind", facts.kind, f"{_plural(len(facts.shards), 'shard')}, {sum(facts.shard_sizes) / 1e6:,.1f} MB")
    table.add_row("samples kept", f"{facts.kept:,}", f"of {facts.samples:,}; {lost / max(1, facts.samples):.2%} left out")
    table.add_row("text tokens", f"{facts.text_tokens:,}", _spread(counts.text, "a sample"))
    table.add_row("elements", f"{counts.elements.total:,}", _spread(counts.elements, "a sample"))
    table.add_row("images", f"{facts.images:,}", _spread(counts.images, "a sample") if facts.images else "")
    if counts.widths:
        middle = f"{counts.widths.quantile(0.5)} x {counts.heights.quantile(0.5)}"
        largest = f"{counts.widths.quantile(1)} x {counts.heights.quantile(1)}"
        table.add_row("image size", middle, f"median width x height; max {largest}")
    return table


def _spread(counts: Counts, of: str) -> str:
    return f"{of}: median {counts.quantile(0.5):,}, p99 {counts.quantile(0.99):,}, max {counts.quantile(1):,}"


def _damage(source: ShardSource) -> Table:
    table = Table(title="left out", title_justify="left", title_style="bold red", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("samples", justify="right")
    table.add_column("reason")
    table.add_column("such as (all in " + source.damaged.name + ")", overflow="fold")
    examples: dict[str, list[str]] = {}
    with source.damaged.open() as lines:
        for line in lines:
            entry = json.loads(line)
            named = examples.setdefault(entry["reason"].partition(":")[0], [])
            if len(named) < EXAMPLES:
                named.append(f"{entry['shard']} {entry['key'] or 'at byte ' + str(entry['offset'])}")
    for reason, count in sorted(source.facts.damaged.items(), key=lambda item: -item[1]):
        table.add_row(f"{count:,}", Text(reason), Text(", ".join(examples.get(reason, []))))
    return table


def _histogram(title: str, unit: str, counts: Counts, bar: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(unit, justify="right")
    table.add_column("samples", justify="right")
    table.add_column()
    bins = counts.bins()
    most = max(count for _, _, count in bins)
    for first, last, count in bins:
        label = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        table.add_row(label, f"{count:,}", Text(bar * -(-count * BAR // most), style="cyan"))
    return table


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
