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
import uuid
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from data_pipeline.errors import UserError
from data_pipeline.plan.columns import ELEMENT
from data_pipeline.read.paths import ShardPath, index_option
from data_pipeline.shards.index import OK, ShardIndex, list_shards, read_index, sidecar_path

VERSION = 2
BLOCK_SAMPLES = 250
"""Kept samples of a block: small enough to shuffle by, large enough that the block table of a billion samples is small."""
ROW = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("first_element", "<u8"), ("digest", "<u8")])
"""`digest` is the first 8 bytes of `sample_digest`: a reader knows a replaced shard or a rotten block by it."""
SOURCE_FILE = "source.json"


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
        UserError: a sidecar is missing, or sidecars disagree about kind or tokenizer; or no sample can be used.
    """
    shards = list_shards(source)
    missing = [s for s in shards if not sidecar_path(s, index_dir).exists()]
    again = f"run: xc-data index {source} --tokenizer FOLDER{index_option(source, index_dir)}"
    if missing:
        raise UserError(f"{len(missing)} of {len(shards)} shards have no index, first {missing[0].name} ({again})")
    indexes = [read_index(sidecar_path(s, index_dir), source) for s in shards]
    changed = [s.name for s, i in zip(shards, indexes, strict=True) if s.stat().st_size != i.facts["size"]]
    if changed:
        raise UserError(f"{changed[0]} changed since it was indexed ({again})")
    for key in ("kind", "tokenizer"):
        if len({i.facts[key] for i in indexes}) > 1:
            raise UserError(f"the shards of {source} were indexed with different values of {key} (run xc-data index again for all)")
    digest = source_digest([i.facts for i in indexes])
    folder = index_dir / f"columns-{digest[:16]}"
    try:
        facts = _write(indexes, index_dir, folder, digest)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror} (free space, or choose another folder: --index-dir)") from None
    return facts


def source_digest(facts: list[dict[str, Any]]) -> str:
    """Digest of a source, from what its sidecars say of themselves, in the order of the shards."""
    return hashlib.sha256(json.dumps([[f["shard"], f["digest"]] for f in facts]).encode()).hexdigest()


def _write(indexes: list[ShardIndex], index_dir: Path, folder: Path, digest: str) -> SourceFacts:
    rows, elements = _rows(indexes), _elements(indexes)
    status = np.concatenate([np.asarray(i.table["status"].to_pylist(), dtype=object) for i in indexes])
    kept = np.flatnonzero(status == OK).astype("<i8")
    if not kept.size:
        reasons = sorted(set(status))[:3]
        raise UserError(f"no usable sample in {index_dir} ({'; '.join(map(str, reasons))})")
    columns = {"rows": rows, "elements": elements, "kept": kept, "blocks": _blocks(rows["shard"][kept])}
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    for name, values in columns.items():
        _write_file(partial / f"{name}.bin", np.ascontiguousarray(values).tobytes())
    damaged = _damaged(indexes)
    _write_file(partial / "damaged.jsonl", "".join(json.dumps(d) + "\n" for d in damaged).encode())
    if folder.exists():  # the same digest: the same content
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()
    else:
        partial.replace(folder)
    reasons: dict[str, int] = {}
    for d in damaged:
        # by class, what comes before the colon: the detail differs from sample to sample and stays in damaged.jsonl
        reason = d["reason"].partition(":")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    facts = SourceFacts(
        version=VERSION,
        kind=indexes[0].facts["kind"],
        tokenizer=indexes[0].facts["tokenizer"],
        digest=digest,
        shards=[i.facts["shard"] for i in indexes],
        shard_sizes=[i.facts["size"] for i in indexes],
        shard_first_rows=np.cumsum([0] + [i.table.num_rows for i in indexes])[:-1].tolist(),
        samples=len(rows),
        kept=len(kept),
        elements=len(elements),
        text_tokens=int(elements["tokens"].sum()),
        images=int((elements["width"] > 0).sum()),
        damaged=reasons,
        columns=folder.name,
    )
    temporary = index_dir / f".{SOURCE_FILE}.{uuid.uuid4().hex}"
    _write_file(temporary, json.dumps(asdict(facts), indent=1).encode())
    temporary.replace(index_dir / SOURCE_FILE)
    return facts


def _rows(indexes: list[ShardIndex]) -> np.ndarray:
    rows = np.zeros(sum(i.table.num_rows for i in indexes), ROW)
    first = 0
    counts = []
    for number, index in enumerate(indexes):
        last = first + index.table.num_rows
        rows["shard"][first:last] = number
        rows["size"][first:last] = index.table["size"].to_numpy()
        rows["offset"][first:last] = index.table["offset"].to_numpy()
        rows["digest"][first:last] = [int.from_bytes(d[:8], "little") for d in index.table["digest"].to_pylist()]
        counts.append(pc.list_value_length(index.table["elements"]).to_numpy())
        first = last
    rows["first_element"] = np.concatenate([[0], np.cumsum(np.concatenate(counts))])[:-1]
    return rows


def _elements(indexes: list[ShardIndex]) -> np.ndarray:
    parts = []
    for index in indexes:
        flat = pc.list_flatten(index.table["elements"])
        part = np.zeros(len(flat), ELEMENT)
        for name in ELEMENT.names:
            part[name] = pc.struct_field(flat, name).to_numpy()
        parts.append(part)
    return np.concatenate(parts)


def _blocks(shard_of_kept: np.ndarray) -> np.ndarray:
    """Kept ordinals at which blocks begin: at each shard's first kept sample, then every `BLOCK_SAMPLES`."""
    starts = []
    borders = np.concatenate([[0], np.flatnonzero(np.diff(shard_of_kept)) + 1, [len(shard_of_kept)]])
    for first, last in pairwise(borders):
        starts.append(np.arange(first, last, BLOCK_SAMPLES))
    return np.concatenate([*starts, [len(shard_of_kept)]]).astype("<i8")


def _damaged(indexes: list[ShardIndex]) -> list[dict[str, Any]]:
    found = []
    for index in indexes:
        bad = index.table.filter(pc.not_equal(index.table["status"], OK)).select(["key", "offset", "size", "status"])
        for row in bad.to_pylist():
            found.append(
                {"shard": index.facts["shard"], "key": row["key"], "offset": row["offset"], "size": row["size"], "reason": row["status"]}
            )
    return found


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
