"""A source at run time: the plan's columns by `pread`, and where each sample's bytes lie.

Invariant: opening a source costs the same whatever its size; only `source.json` and the block table are read.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import TryAgainError, UserError, cannot_read
from data_pipeline.plan.columns import ELEMENT
from data_pipeline.read.paths import ShardPath, index_folder, index_option, to_path
from data_pipeline.read.remote import Patience
from data_pipeline.samples import Kind
from data_pipeline.shards import selection as selections
from data_pipeline.shards.index import read_index, sidecar_path
from data_pipeline.shards.merge import ROW, SOURCE_FILE, VERSION, SourceFacts


class Location(NamedTuple):
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

    def __init__(
        self,
        name: str,
        path: str | ShardPath,
        index_dir: str | Path | None = None,
        selection: str | Path | None = None,
        *,
        patience: Patience | None = None,
        key: str | None = None,
    ) -> None:
        """Opens the source in `path`, its index beside the shards or in `index_dir`; all its usable samples, or those of a selection.

        `patience` is for remote shards; `key` of a config or an option named the folder, for messages: by default data.sources.NAME.path.

        Raises:
            UserError: no such folder, or not indexed and merged; no such selection, or one of another index.
            TryAgainError: the file system failed.
        """
        self.name = name
        self.path = to_path(path, patience)
        self.index_dir = index_folder(self.path, index_dir)
        if not self.path.is_dir():
            raise UserError(f"{key or f'data.sources.{name}.path'}: no such shard folder: {self.path.resolve()} (mend the path)")
        self.facts = self._read_facts()
        self.kind = Kind(self.facts.kind)
        self.digest = self.facts.digest
        self.text_tokens = self.facts.text_tokens
        self.images = self.facts.images
        self._files: dict[str, int] = {}
        self._shard_paths: dict[int, ShardPath] = {}
        self._kept = self._columns
        if selection:
            self._kept = Path(selection)
            chosen = selections.read(self._kept, self.facts.digest, f"data.sources.{name}.selection")
            self.digest = hashlib.sha256(f"{self.facts.digest} {chosen.digest}".encode()).hexdigest()
            self.text_tokens, self.images = chosen.text_tokens, chosen.images
        try:
            self.block_starts = np.frombuffer(self._column("blocks").read_bytes(), "<i8")
        except OSError as error:
            raise self._failed("blocks", error) from None

    def require_tokenizer(self, digest: str) -> None:
        """Refuses a tokenizer that is not the index's.

        Raises:
            UserError: with the command that fixes it.
        """
        if self.facts.tokenizer != digest:
            raise UserError(
                f"source {self.name}: {self.index_dir} was indexed with another tokenizer "
                f"({self.facts.tokenizer[:12]}, not {digest[:12]}; {self._index_and_merge})"
            )

    def kept(self, first: int, last: int) -> np.ndarray:
        """Rows of the kept ordinals [first, last), int64, ascending."""
        return self._read("kept", first, last, np.dtype("<i8"))

    def kept_runs(self, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Rows of the kept ordinals of each run [first, end), joined, int64."""
        return self._read_runs("kept", firsts, ends, np.dtype("<i8"))

    def elements(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Element counts int64 [n] of `rows` and their ELEMENT records, concatenated in that order."""
        if not len(rows):
            return np.zeros(0, np.int64), np.zeros(0, ELEMENT)
        distinct, place = np.unique(rows, return_inverse=True)
        borders = np.flatnonzero(np.diff(distinct) > _RUN_GAP) + 1
        firsts, ends = distinct[np.append(0, borders)], distinct[np.append(borders, len(distinct)) - 1] + 1
        starts = self._element_starts(firsts, ends)
        run_starts = _begins(ends - firsts + 1)  # a run of n rows has n + 1 borders of elements
        element_firsts, element_ends = starts[run_starts], starts[run_starts + ends - firsts]
        records = self._read_runs("elements", element_firsts, element_ends, ELEMENT)
        run = np.repeat(np.arange(len(firsts)), np.diff(borders, prepend=0, append=len(distinct)))
        at = run_starts[run] + distinct - firsts[run]
        begins = starts[at] + (_begins(element_ends - element_firsts) - element_firsts)[run]
        counts, begins = np.diff(starts)[at][place], begins[place]
        return counts, records[np.repeat(begins - _begins(counts), counts) + np.arange(counts.sum())]

    def locate(self, row: int) -> Location:
        """Where the bytes of a sample lie."""
        record = self._read("rows", row, row + 1, ROW)[0]
        shard = int(record["shard"])
        return Location(
            self._shard_path(shard), self.facts.shard_sizes[shard], int(record["offset"]), int(record["size"]), int(record["digest"])
        )

    def _shard_path(self, shard: int) -> ShardPath:
        if shard not in self._shard_paths:  # joining a path costs more than reading a row
            self._shard_paths[shard] = self.path / self.facts.shards[shard]
        return self._shard_paths[shard]

    def row_at(self, shard: str, offset: int) -> int | None:
        """The row that begins at this byte of a shard; None where no indexed sample does."""
        if shard not in self.facts.shards:
            return None
        first, end = self.rows_of(self.facts.shards.index(shard))
        found = np.flatnonzero(self._read("rows", first, end, ROW)["offset"] == offset)
        return first + int(found[0]) if len(found) else None

    def rows_of(self, shard: int) -> tuple[int, int]:
        """The rows [first, end) of the shard with this number."""
        return self.facts.shard_first_rows[shard], [*self.facts.shard_first_rows, self.facts.samples][shard + 1]

    def key(self, row: int) -> str:
        """Key of a sample."""
        shard = self.shard_of(row)
        return self.shard_keys(shard)[row - self.facts.shard_first_rows[shard]].as_py()

    def keys(self) -> Iterator[str]:
        """Keys of all rows, in order, a sidecar's at a time."""
        return (key for shard in range(len(self.facts.shards)) for key in self.shard_keys(shard).to_pylist())

    def shard_of(self, row: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect.bisect_right(self.facts.shard_first_rows, row) - 1

    def shard_keys(self, shard: int) -> pa.ChunkedArray:
        """Keys of a shard's samples, in order, from its sidecar: for people and ledgers, not for the hot path."""
        return read_index(sidecar_path(self.path / self.facts.shards[shard], self.index_dir), self.path, ["key"]).table["key"]

    def find(self, key: str) -> list[int]:
        """Rows with this key, one a shard at most but for duplicates; reads sidecar after sidecar."""
        rows = []
        for shard, first in enumerate(self.facts.shard_first_rows):
            found = pc.indices_nonzero(pc.equal(self.shard_keys(shard), key))
            rows += [first + i for i in found.to_pylist()]
        return rows

    @property
    def damaged(self) -> Path:
        """JSONL of what the index could not use."""
        return self._columns / "damaged.jsonl"

    @property
    def _columns(self) -> Path:
        return self.index_dir / self.facts.columns

    def _read_facts(self) -> SourceFacts:
        file = self.index_dir / SOURCE_FILE
        cure = self._index_and_merge
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise UserError(f"source {self.name} is not indexed: no {file.resolve()} ({cure})") from None
        except OSError as error:
            raise cannot_read(file, error) from None
        except ValueError as error:
            raise UserError(f"source {self.name}: {file} unreadable: {error} ({cure})") from None
        if not isinstance(raw, dict) or raw.get("version") != VERSION or {f.name for f in fields(SourceFacts)} != raw.keys():
            raise UserError(f"source {self.name}: {file} is of another version ({cure})")
        return SourceFacts(**raw)

    def _element_starts(self, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """First elements of the rows [first, end] of each run, the end's own included: where the one before stops."""
        starts = self._read_runs("rows", firsts, np.minimum(ends + 1, self.facts.samples), ROW)["first_element"].astype(np.int64)
        return starts if ends[-1] < self.facts.samples else np.append(starts, self.facts.elements)

    def _read(self, column: str, first: int, end: int, dtype: np.dtype) -> np.ndarray:
        size = (end - first) * dtype.itemsize
        try:
            data = os.pread(self._file(column), size, first * dtype.itemsize)
        except OSError as error:
            raise self._failed(column, error) from None
        self._require(column, len(data) == size)
        return np.frombuffer(data, dtype)

    def _read_runs(self, column: str, firsts: np.ndarray, ends: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The items [first, end) of each run, concatenated: one `pread` a run."""
        sizes, offsets = (ends - firsts) * dtype.itemsize, firsts * dtype.itemsize
        try:
            data = b"".join(map(os.pread, repeat(self._file(column)), sizes.tolist(), offsets.tolist()))
        except OSError as error:
            raise self._failed(column, error) from None
        self._require(column, len(data) == sizes.sum())
        return np.frombuffer(data, dtype)

    def _file(self, column: str) -> int:
        if column not in self._files:
            self._files[column] = os.open(self._column(column), os.O_RDONLY)
        return self._files[column]

    def _column(self, column: str) -> Path:
        return (self._kept if column in _SELECTED else self._columns) / f"{column}.bin"

    def _require(self, column: str, whole: bool) -> None:
        if not whole:
            raise UserError(f"source {self.name}: {self._column(column)} is cut short ({self._cure(column)})")

    def _failed(self, column: str, error: OSError) -> UserError | TryAgainError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"source {self.name}: no {self._column(column)} ({self._cure(column)})")
        return cannot_read(self._column(column), error)

    def _cure(self, column: str) -> str:
        return self._index_and_merge if self._column(column).parent == self._columns else "remove its folder, then run xc-data select again"

    @property
    def _index_and_merge(self) -> str:
        option = index_option(self.path, self.index_dir)
        return f"run: xc-data index {self.path} --tokenizer FOLDER{option}, then xc-data merge {self.path}{option}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


_SELECTED = ("kept", "blocks")
"""Columns that a selection has of its own."""
_RUN_GAP = 64
"""Rows closer than this are read in one `pread`: a gap of 64 rows costs less than a system call."""


def _begins(lengths: np.ndarray) -> np.ndarray:
    """Where each of parts of these lengths begins once they are joined."""
    return np.cumsum(lengths) - lengths
