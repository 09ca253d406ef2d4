"""Which local file holds the image of a URL, from a list that whoever fetched the images wrote.

Invariant: only the URLs that are asked for are kept, however long the list is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import UserError
from data_pipeline.importers.contract import input_files
from data_pipeline.importers.records import records


def read_map(path: Path, urls: set[str]) -> dict[str, str]:
    """Path below the image folder by URL, for those of `urls` that the map knows.

    Args:
        path: JSON lines {url, file}, or Parquet with these columns; or a folder of the Parquet files that img2dataset writes beside
            its image files (`--output_format files`): columns url and key, the image is NAME/KEY.jpg beside NAME.parquet.
        urls: what is asked for.

    Raises:
        UserError: the map cannot be read.
    """
    wanted = pa.array(sorted(urls), pa.string())
    found: dict[str, str] = {}
    for file in input_files(path, (".parquet", ".jsonl")):
        found.update(_from_parquet(file, wanted) if file.suffix == ".parquet" else _from_lines(file, urls))
    return found


def _from_lines(file: Path, urls: set[str]) -> Iterator[tuple[str, str]]:
    for row, record in records(file):
        if not isinstance(record, dict) or not isinstance(record.get("url"), str) or not isinstance(record.get("file"), str):
            raise UserError(f"{file} line {row + 1} is no {{url, file}} (mend --map)")
        if record["url"] in urls:
            yield record["url"], record["file"]


def _from_parquet(file: Path, wanted: pa.Array) -> Iterator[tuple[str, str]]:
    try:
        names = pq.read_schema(file).names
        column = next((name for name in ("file", "key") if name in names), None)
        if column is None or "url" not in names:
            raise UserError(f"{file} has no columns url and file, or url and key (mend --map)")
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(columns=["url", column], use_threads=False):
                kept: Any = batch.filter(pc.is_in(batch.column("url").cast(pa.string()), value_set=wanted))
                for url, name in zip(kept.column("url").to_pylist(), kept.column(column).to_pylist(), strict=True):
                    yield url, name if column == "file" else f"{file.stem}/{name}.jpg"
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())} (mend --map)") from None
