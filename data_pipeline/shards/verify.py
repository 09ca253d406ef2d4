"""Reads shards again and compares what is there with what was indexed.

Invariant: reads as a training run does, so that a sample which passes is one that a run can read; nothing is written.
"""

from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.errors import TryAgainError
from data_pipeline.read.paths import index_option
from data_pipeline.read.storage import ShardReader
from data_pipeline.samples import BadSample
from data_pipeline.shards.source import ShardSource


@dataclass(frozen=True)
class Mismatch:
    """A sample that is not what was indexed."""

    shard: str
    key: str
    offset: int
    size: int
    reason: str


@dataclass
class Verified:
    """What was read of one shard or, added up, of many."""

    samples: int = 0
    bytes: int = 0
    wrong: list[Mismatch] = field(default_factory=list)
    unread: list[Mismatch] = field(default_factory=list)
    """Where the file system failed: nothing is known of these and of what follows in their shards."""

    def add(self, other: "Verified") -> None:
        """Takes in the other's counts."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.wrong += other.wrong
        self.unread += other.unread


def verify_shard(shard: int, source: ShardSource, share: float) -> Verified:
    """Reads samples of the shard with this number: all of them, or a random share, one at least."""
    first, end = source.rows_of(shard)
    rows = np.arange(first, end)
    if share < 1:
        rng = np.random.default_rng()
        rows = np.sort(rng.choice(rows, max(1, round(share * len(rows))), replace=False)) if len(rows) else rows
    reader, found, keys = ShardReader(), Verified(), None
    for row in rows.tolist():
        at = source.locate(row)
        if not at.size:  # damage of the tar itself, which holds no sample
            continue
        found.samples += 1
        found.bytes += at.size
        try:
            reader.read(at)
            continue
        except BadSample as error:
            listed, reason = found.wrong, str(error)
        except TryAgainError as error:
            listed, reason = found.unread, f"the rest of the shard was not checked: {error}"
        if keys is None:
            keys = source.shard_keys(shard)
        listed.append(Mismatch(source.facts.shards[shard], keys[row - first].as_py(), at.offset, at.size, reason))
        if listed is found.unread:
            break
    return found


def print_verified(source: ShardSource, shards: int, found: Verified) -> None:
    """Prints what was read, and every sample that is not what was indexed or could not be read."""
    console = Console(highlight=False)
    share = len(found.wrong) / max(1, found.samples)
    read = f"{source.path}: {found.samples:,} samples, {found.bytes / 1e6:,.1f} MB in {shards:,} shards read"
    if not found.wrong and not found.unread:
        console.print(Text(f"{read}, all as indexed", "green"), soft_wrap=True)
        return
    unread = f", {len(found.unread):,} not to their end" if found.unread else ""
    style = "bold red" if found.wrong else "yellow"
    console.print(Text(f"{read}{unread}, {len(found.wrong):,} ({share:.2%}) not as indexed", style), soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("shard", "key", "bytes", "reason"):
        table.add_column(column, overflow="fold")
    for m in [*found.wrong, *found.unread]:
        table.add_row(Text(m.shard), Text(m.key), f"{m.offset}+{m.size}", Text(m.reason))
    console.print(table)
    if not found.wrong:
        return
    again = f"xc-data index {source.path} --tokenizer FOLDER{index_option(source.path, source.index_dir)}"
    console.print(f"index what is there: {again}; or bring the shards back", soft_wrap=True)
