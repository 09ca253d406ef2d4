"""A source at run time: the plan's columns by `pread`, and where each sample's bytes lie.

Invariant: opening a source costs the same whatever its size; only `source.json` and the block table are read.
"""

import bisect
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.plan.columns import ELEMENT
from data_pipeline.read.paths import ShardPath, index_folder, to_path
from data_pipeline.read.remote import Patience
from data_pipeline.samples import Kind
from data_pipeline.shards.index import read_index, sidecar_path
from data_pipeline.shards.merge import ROW, SOURCE_FILE, VERSION, SourceFacts


@dataclass(frozen=True)
class Location:
    """Where a sample's bytes lie."""

    shard: ShardPath
    shard_size: int
    """Bytes of the shard when it was indexed: another size is another shard."""
    offset: int
    size: int
    digest: int
    """First 8 bytes of `sample_digest`, little endian."""


class ShardSource:
    """A merged source; satisfies `data_pipeline.plan.columns.PlanSource`. Cheap to pickle: columns are opened on first use."""

    def __init__(self, name: str, path: str | ShardPath, index_dir: str | Path | None = None, *, patience: Patience | None = None) -> None:
        """Opens the source in `path`, its index beside the shards or in `index_dir`; `patience` is for remote shards.

        Raises:
            UserError: no such folder, or not indexed and merged.
        """
        self.name = name
        self.path = to_path(path, patience)
        self.index_dir = index_folder(self.path, index_dir)
        if not self.path.is_dir():
            raise UserError(f"data.sources.{name}.path: no such shard folder: {self.path.resolve()} (mend the path)")
        self.facts = self._read_facts()
        self.kind = Kind(self.facts.kind)
        self.digest = self.facts.digest
        self.text_tokens = self.facts.text_tokens
        self.images = self.facts.images
        self._files: dict[str, int] = {}
        self.block_starts = np.frombuffer((self._columns / "blocks.bin").read_bytes(), "<i8")

    def require_tokenizer(self, digest: str) -> None:
        """Refuses a tokenizer that is not the index's.

        Raises:
            UserError: with the command that fixes it.
        """
        if self.facts.tokenizer != digest:
            raise UserError(
                f"source {self.name}: {self.index_dir} was indexed with another tokenizer "
                f"({self.facts.tokenizer[:12]}, not {digest[:12]}): "
                f"run xc-data index {self.path} --tokenizer FOLDER, then xc-data merge {self.path}"
            )

    def kept(self, first: int, last: int) -> np.ndarray:
        """Rows of the kept ordinals [first, last), int64, ascending."""
        return self._read("kept", first, last - first, np.dtype("<i8"))

    def elements(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Element counts int64 [n] of `rows` and their ELEMENT records, concatenated in that order."""
        if not len(rows):
            return np.zeros(0, np.int64), np.zeros(0, ELEMENT)
        order = np.argsort(rows, kind="stable")
        counts, begins = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        parts, read = [], 0
        for run in np.split(order, np.flatnonzero(np.diff(rows[order]) > _RUN_GAP) + 1):
            first, last = int(rows[run[0]]), int(rows[run[-1]]) + 1
            starts = self._element_starts(first, last)
            parts.append(self._read("elements", starts[0], starts[-1] - starts[0], ELEMENT))
            counts[run] = np.diff(starts)[rows[run] - first]
            begins[run] = starts[rows[run] - first] - starts[0] + read
            read += len(parts[-1])
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, np.concatenate(parts)[np.repeat(begins, counts) + within]

    def locate(self, row: int) -> Location:
        """Where the bytes of a sample lie."""
        record = self._read("rows", row, 1, ROW)[0]
        shard = int(record["shard"])
        path = self.path / self.facts.shards[shard]
        return Location(path, self.facts.shard_sizes[shard], int(record["offset"]), int(record["size"]), int(record["digest"]))

    def key(self, row: int) -> str:
        """Key of a sample, from the sidecar: for people and ledgers, not for the hot path."""
        shard = bisect.bisect_right(self.facts.shard_first_rows, row) - 1
        sidecar = sidecar_path(self.path / self.facts.shards[shard], self.index_dir)
        return read_index(sidecar).table["key"][row - self.facts.shard_first_rows[shard]].as_py()

    def keys(self) -> list[str]:
        """Keys of all rows, from all sidecars: for held-out sources, which are small."""
        shards = (self.path / name for name in self.facts.shards)
        return [key for shard in shards for key in read_index(sidecar_path(shard, self.index_dir)).table["key"].to_pylist()]

    @property
    def damaged(self) -> Path:
        """JSONL of what the index could not use."""
        return self._columns / "damaged.jsonl"

    @property
    def _columns(self) -> Path:
        return self.index_dir / self.facts.columns

    def _read_facts(self) -> SourceFacts:
        file = self.index_dir / SOURCE_FILE
        cure = f"run: xc-data index {self.path} --tokenizer FOLDER, then xc-data merge {self.path}"
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise UserError(f"source {self.name} is not indexed: no {file.resolve()} ({cure})") from None
        except (OSError, ValueError) as error:
            raise UserError(f"source {self.name}: {file} unreadable: {error} ({cure})") from None
        if not isinstance(raw, dict) or raw.get("version") != VERSION or {f.name for f in fields(SourceFacts)} != raw.keys():
            raise UserError(f"source {self.name}: {file} is of another version ({cure})")
        return SourceFacts(**raw)

    def _element_starts(self, first: int, last: int) -> np.ndarray:
        starts = self._read("rows", first, min(last + 1, self.facts.samples) - first, ROW)["first_element"].astype(np.int64)
        return starts if last < self.facts.samples else np.append(starts, self.facts.elements)

    def _read(self, column: str, first: int, count: int, dtype: np.dtype) -> np.ndarray:
        if column not in self._files:
            self._files[column] = os.open(self._columns / f"{column}.bin", os.O_RDONLY)
        size = int(count) * dtype.itemsize
        data = os.pread(self._files[column], size, int(first) * dtype.itemsize)
        if len(data) != size:
            raise UserError(f"source {self.name}: {self._columns / column}.bin is cut short (run: xc-data merge {self.path})")
        return np.frombuffer(data, dtype)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


_RUN_GAP = 64
"""Rows closer than this are read in one `pread`: a gap of 64 rows costs less than a system call."""
