"""Parquet files, row group by row group: which of them are a task's own, and their rows as a stream.

Invariant: a row's number does not depend on how many tasks there are; a file or row group that cannot be read is left out as a whole
and the next one is read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import TryAgainError
from data_pipeline.shards.write import Refused

BATCH = 32
"""Rows decoded at once: images are large."""


@dataclass(frozen=True)
class RowGroup:
    """A row group of one of the files."""

    file: int
    group: int
    first_row: int
    rows: int


def share(files: Sequence[Path], task: int, tasks: int) -> list[RowGroup | Refused]:
    """The row groups of a task: a run of all, in the order of files; a file that is no Parquet stands as its reason."""
    units: list[RowGroup | Refused] = []
    for number, file in enumerate(files):
        try:
            with _errors(file), pq.ParquetFile(file) as table:
                counts = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
                starts = accumulate(counts, initial=0)
        except _Unreadable as error:
            units.append(Refused(file.name, 0, f"not a Parquet file: {error}"))
            continue
        units += [RowGroup(number, g, start, count) for g, (start, count) in enumerate(zip(starts, counts, strict=False))]
    return units[len(units) * task // tasks : len(units) * (task + 1) // tasks]


def schema(file: Path) -> pa.Schema | None:
    """Columns and types of a file; None if it cannot be read."""
    try:
        with _errors(file):
            return pq.read_schema(file)
    except _Unreadable:
        return None


def rows(files: Sequence[Path], unit: RowGroup, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]] | Refused]:
    """(row of the file, values by column) of a row group; where it cannot be read, the reason, which stands for the rest of it.

    Raises:
        TryAgainError: the file system failed.
    """
    file, row, end = files[unit.file], unit.first_row, unit.first_row + unit.rows
    try:
        with _errors(file):
            table = pq.ParquetFile(file)
        missing = [name for name in columns if name not in table.schema_arrow.names]
        if missing:
            raise _Unreadable(f"no column {missing[0]}")
        batches = table.iter_batches(BATCH, row_groups=[unit.group], columns=list(columns), use_threads=False)
        while row < end:
            with _errors(file):
                batch = next(batches)
            for i in range(batch.num_rows):
                try:
                    with _errors(file):
                        found = row, {name: batch.column(name)[i].as_py() for name in columns}
                except _Unreadable as error:
                    yield Refused(file.name, row, f"row unreadable: {error}")
                else:
                    yield found
                row += 1
    except _Unreadable as error:
        yield Refused(file.name, row, f"row group unreadable: {error}", end - row)


class _Unreadable(Exception):  # noqa: N818  a fact about data, not a fault of the program
    """Damage that comes again."""


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    """Tells damage from a file system that fails: Arrow raises OSError for both, with a number only for the latter."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise TryAgainError(f"cannot read {file}: {error} (mend the file system or its rights, then run the same again)") from None
        raise _Unreadable(" ".join(str(error).split())) from None
    except (pa.ArrowException, ValueError, StopIteration) as error:
        raise _Unreadable(" ".join(str(error).split()) or "rows are missing") from None
