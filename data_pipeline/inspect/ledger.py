"""The ledger of a run, for people: what was dropped and why, and a selection for the next run that does without.

Invariant: reads the run directory and the index alone; neither is changed.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.configure import load_data_view
from data_pipeline.errors import UserError
from data_pipeline.read.ledger import read_ledger
from data_pipeline.shards import selection
from data_pipeline.shards.selection import Selection
from data_pipeline.shards.source import ShardSource

EXAMPLES = 3
"""Samples that are named of each reason."""
_CHUNK = 1 << 20


def print_ledger(run: Path) -> None:
    """Prints the ledger of a run directory as a table by source and reason.

    Raises:
        UserError: it is no run directory.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in _entries(run):
        when = "while training" if "step" in entry else "when indexed"
        groups[entry["source"], when, entry["reason"].partition(":")[0]].append(entry)
    console = Console(highlight=False)
    if not groups:
        console.print(f"{run}: no sample was left out", soft_wrap=True)
        return
    table = Table(title=Text(f"left out of {run}", "bold"), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("source", "when", "samples", "segments", "steps", "reason", "such as"):
        table.add_column(column, overflow="fold", justify="right" if column in ("samples", "segments") else "left")
    for (source, when, reason), entries in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] == "when indexed", -len(item[1]))
    ):
        samples = {(e["shard"], e["offset"]): e for e in entries}
        steps = [e["step"] for e in entries if "step" in e]
        span = f"{min(steps) + 1} to {max(steps) + 1}" if steps else ""
        named = [f"{e['shard']} {e['key'] or 'at byte ' + str(e['offset'])}" for e in list(samples.values())[:EXAMPLES]]
        segments = f"{len(entries):,}" if steps else ""
        table.add_row(Text(source), when, f"{len(samples):,}", segments, span, Text(reason), Text(", ".join(named)))
    console.print(table)


def select_without(run: Path, name: str, made_by: str, folder: Path) -> Selection:
    """Writes a selection of what the run used of a source, without the samples that it had to drop.

    Args:
        run: the run directory.
        name: of the source in the run's config.
        made_by: the command.
        folder: of the selection; must not exist.

    Raises:
        UserError: no such source, nothing to leave out, or the source was indexed again since.
    """
    config = load_data_view(run / "config.yaml").data.sources
    if name not in config:
        raise UserError(f"--source {name!r} is not a source of {run} (give one of {', '.join(config)})")
    found = config[name]
    whole = ShardSource(name, found.path, found.index_dir)
    used = ShardSource(name, found.path, found.index_dir, found.selection)
    places = {(e["shard"], e["offset"]) for e in _entries(run) if "step" in e and e["source"] == name}
    if not places:
        raise UserError(f"{run} dropped nothing of {name} while it trained (there is nothing to leave out)")
    rows = [whole.row_at(*place) for place in sorted(places)]
    if None in rows:
        raise UserError(f"the ledger of {run} is of another index of {found.path}, which was indexed again since (run on the new index)")
    bad = np.array(rows, np.int64)
    left_out: dict[str, int] = {}
    return selection.write(whole, _rows(used, bad, int(whole.block_starts[-1]), left_out), left_out, made_by, folder)


def _rows(source: ShardSource, bad: np.ndarray, usable: int, left_out: dict[str, int]) -> Iterator[np.ndarray]:
    kept, count = 0, int(source.block_starts[-1])
    for first in range(0, count, _CHUNK):
        rows = source.kept(first, min(first + _CHUNK, count))
        rows = rows[~np.isin(rows, bad)]
        kept += len(rows)
        yield rows
    if count < usable:
        left_out["selection before"] = usable - count
    left_out["ledger"] = count - kept


def _entries(run: Path) -> list[dict[str, Any]]:
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is no run directory: no config.yaml in it (give the directory of run.dir)")
    return read_ledger(run)
