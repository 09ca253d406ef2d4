"""Merges the sidecars of a source into `source.json` and the plan's columns.

Invariant: `source.json` appears last and names a finished folder of columns, so that a reader sees the old merge or the new one.

Columns, little endian, read by `pread`:
    rows.bin      ROW per sample of all shards, damaged ones included; row r's elements end where row r+1's begin
    elements.bin  ELEMENT per element
    kept.bin      int64, rows that can be used, ascending
    blocks.bin    int64 [B+1], kept ordinal at which each physical block begins
"""

import hashlib
import json
import os
import shutil
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.plan.columns import ELEMENT
from data_pipeline.read.paths import ShardPath, index_option
from data_pipeline.shards.index import OK, list_shards, read_facts, read_index, require_facts, require_own, sidecar_path

VERSION = 2
BLOCK_SAMPLES = 250
"""Kept samples of a block: small enough to shuffle by, large enough that the block table of a billion samples is small."""
ROW = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("first_element", "<u8"), ("digest", "<u8")])
"""`digest` is the first 8 bytes of `sample_digest`: a reader knows a replaced shard or a rotten block by it."""
SOURCE_FILE = "source.json"
_FILES = ("rows.bin", "elements.bin", "kept.bin", "blocks.bin", "damaged.jsonl")
_TAKEN = ["key", "offset", "size", "elements", "digest", "status"]
"""Columns of a sidecar that a merge reads."""


@dataclass
class SourceFacts:
    """`source.json`: what a source is."""

    version: int
    kind: str
    tokenizer: str
    digest: str
    shards: list[str]
    shard_sizes: list[int]
    shard_first_rows: list[int]
    samples: int
    kept: int
    elements: int
    text_tokens: int
    images: int
    damaged: dict[str, int]
    columns: str


def merge(source: ShardPath, index_dir: Path) -> SourceFacts:
    """Writes `source.json`, the columns and `damaged.jsonl` from the sidecars.

    Raises:
        UserError: a sidecar is missing, or sidecars disagree about kind or tokenizer; no sample can be used; the folder holds the merged
            index of another source.
        TryAgainError: the file system failed, or a shard was indexed meanwhile.
    """
    shards = list_shards(source)
    missing = [s for s in shards if not sidecar_path(s, index_dir).exists()]
    again = f"run: xc-data index {source} --tokenizer FOLDER{index_option(source, index_dir)}"
    if missing:
        raise UserError(f"{len(missing)} of {len(shards)} shards have no index, first {missing[0].name} ({again})")
    facts = [require_facts(sidecar_path(s, index_dir), source) for s in shards]
    ours = {sidecar_path(s, index_dir) for s in shards}
    for sidecar in [s for s in _merged_before(source, index_dir) if s not in ours][:1]:  # it stands for all: they are of one source
        require_own(sidecar, read_facts(sidecar), str(shards[0].parent.resolve()))
    changed = [s.name for s, f in zip(shards, facts, strict=True) if s.stat().st_size != f["size"]]
    if changed:
        raise UserError(f"{changed[0]} changed since it was indexed ({again})")
    for key in ("kind", "tokenizer"):
        if len({f[key] for f in facts}) > 1:
            raise UserError(f"the shards of {source} were indexed with different values of {key} (run xc-data index again for all)")
    folder = index_dir / f"columns-{source_digest(facts)[:16]}"
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        with ExitStack() as opened:
            columns = _Columns({name: opened.enter_context((partial / name).open("wb")) for name in _FILES})
            for shard, said in zip(shards, facts, strict=True):
                columns.append(said["shard"], _table(shard, index_dir, source, said))
            columns.end()
        if not columns.kept:
            raise UserError(f"no usable sample in {index_dir} ({'; '.join(columns.statuses)})")
        return _publish(facts, columns, index_dir, folder, partial)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror} (free space, or choose another folder: --index-dir)") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _merged_before(source: ShardPath, index_dir: Path) -> list[Path]:
    """The sidecars that the last merge took; none where there was none that can be read."""
    try:
        return [sidecar_path(source / name, index_dir) for name in json.loads((index_dir / SOURCE_FILE).read_bytes())["shards"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def source_digest(facts: list[dict[str, Any]]) -> str:
    """Digest of a source, from what its sidecars say of themselves, in the order of the shards."""
    return hashlib.sha256(json.dumps([[f["shard"], f["digest"]] for f in facts]).encode()).hexdigest()


def _table(shard: ShardPath, index_dir: Path, source: ShardPath, facts: dict[str, Any]) -> pa.Table:
    """What a merge takes of a sidecar, which said `facts` of itself when the merge began."""
    sidecar = sidecar_path(shard, index_dir)
    index = read_index(sidecar, source, _TAKEN)
    if index.facts != facts:
        raise TryAgainError(f"{sidecar} changed while it was merged (run the same again, when nothing indexes the source)")
    return index.table


def _publish(facts: list[dict[str, Any]], columns: "_Columns", index_dir: Path, folder: Path, partial: Path) -> SourceFacts:
    """Gives the columns in `partial` their name, then writes `source.json`."""
    if folder.exists():  # the same digest: the same content
        for file in partial.iterdir():
            file.replace(folder / file.name)
    else:
        partial.replace(folder)
    made = SourceFacts(
        version=VERSION,
        kind=facts[0]["kind"],
        tokenizer=facts[0]["tokenizer"],
        digest=source_digest(facts),
        shards=[f["shard"] for f in facts],
        shard_sizes=[f["size"] for f in facts],
        shard_first_rows=columns.first_rows,
        samples=columns.samples,
        kept=columns.kept,
        elements=columns.elements,
        text_tokens=columns.text_tokens,
        images=columns.images,
        damaged=columns.damaged,
        columns=folder.name,
    )
    temporary = index_dir / f".{SOURCE_FILE}.{uuid.uuid4().hex}"
    with temporary.open("wb") as file:
        file.write(json.dumps(asdict(made), indent=1).encode())
        _to_disk(file)
    temporary.replace(index_dir / SOURCE_FILE)
    return made


class _Columns:
    """The files of columns, which grow by a shard at a time: a source of any size is merged in the memory that its largest shard takes."""

    def __init__(self, files: dict[str, BinaryIO]) -> None:
        """`files` by name, open and empty."""
        self._files = files
        self.first_rows: list[int] = []
        self.samples = self.kept = self.elements = self.text_tokens = self.images = 0
        self.damaged: dict[str, int] = {}
        self.statuses: list[str] = []
        """The first three of all, in alphabetical order."""

    def append(self, shard: str, table: pa.Table) -> None:
        """Adds the samples of the next shard."""
        rows, elements, good = np.zeros(table.num_rows, ROW), _elements(table["elements"]), pc.equal(table["status"], OK)
        counts = pc.list_value_length(table["elements"]).to_numpy().astype(np.int64)
        rows["shard"] = len(self.first_rows)
        rows["size"] = table["size"].to_numpy()
        rows["offset"] = table["offset"].to_numpy()
        rows["first_element"] = self.elements + np.cumsum(counts) - counts
        rows["digest"] = np.frombuffer(b"".join(table["digest"].to_pylist()), "<u8")[::2]
        kept = self.samples + np.flatnonzero(good.to_numpy())
        self._write("rows.bin", rows)
        self._write("elements.bin", elements)
        self._write("kept.bin", kept.astype("<i8"))
        self._write("blocks.bin", np.arange(self.kept, self.kept + len(kept), BLOCK_SAMPLES, "<i8"))
        self._damage(shard, table.filter(pc.invert(good)))
        self.statuses = sorted({*self.statuses, *pc.unique(table["status"]).to_pylist()})[:3]
        self.first_rows.append(self.samples)
        self.samples += len(rows)
        self.kept += len(kept)
        self.elements += len(elements)
        self.text_tokens += int(elements["tokens"].sum())
        self.images += int((elements["width"] > 0).sum())

    def end(self) -> None:
        """Closes the last block, and sees all on the disk."""
        self._write("blocks.bin", np.array([self.kept], "<i8"))
        for file in self._files.values():
            _to_disk(file)

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(values.tobytes())

    def _damage(self, shard: str, bad: pa.Table) -> None:
        for row in bad.select(["key", "offset", "size", "status"]).to_pylist():
            entry = {"shard": shard, "key": row["key"], "offset": row["offset"], "size": row["size"], "reason": row["status"]}
            self._files["damaged.jsonl"].write((json.dumps(entry) + "\n").encode())
            # by class, what comes before the colon: the detail differs from sample to sample and stays in damaged.jsonl
            reason = row["status"].partition(":")[0]
            self.damaged[reason] = self.damaged.get(reason, 0) + 1


def _elements(column: pa.ChunkedArray) -> np.ndarray:
    flat = pc.list_flatten(column)
    found = np.zeros(len(flat), ELEMENT)
    for name in ELEMENT.names:
        found[name] = pc.struct_field(flat, name).to_numpy()
    return found


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
