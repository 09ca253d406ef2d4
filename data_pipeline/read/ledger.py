"""The ledger of bad samples: one JSON line a sample that was dropped, with shard, key, byte range and reason.

Invariant: a line is written once its batch is consumed, by the rank that consumed it; a life that replays a step writes its lines
again, so readers count a (step, source, shard, offset) once.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline import jsonl


@dataclass(frozen=True)
class BadEntry:
    """One dropped segment."""

    source: str
    shard: str
    key: str
    offset: int
    size: int
    reason: str


class Ledger:
    """`RUN/ledger/rank-N.jsonl`; opened when the first line comes."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "ledger" / f"rank-{rank}.jsonl"

    def write(self, step: int, entries: list[BadEntry]) -> None:
        """Appends the entries of a consumed step."""
        if not entries:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        jsonl.append(self._path, ({"step": step, **asdict(e)} for e in entries))


def copy_index_damage(run_dir: Path, damaged: dict[str, Path]) -> None:
    """Writes what the indexes could not use to `RUN/ledger/index.jsonl`, each line with its source's name."""
    target = run_dir / "ledger" / "index.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    for source, path in damaged.items():
        jsonl.append(target, ({"source": source, **entry} for entry in jsonl.read(path)))


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run, each dropped sample of a step once."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in sorted((run_dir / "ledger").glob("*.jsonl")):
        for entry in jsonl.read(file):
            found[entry.get("step", -1), entry["source"], entry["shard"], entry["offset"]] = entry
    return list(found.values())
