"""Curation: SQL over the index of a source, and duplicates left out, as a selection that a config names. No tar is opened.

Invariant: the same index, query and criteria give the same samples; of samples that are alike the first in physical order stays.
The query sees the index and nothing else: no other file, no setting, no network.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pyarrow as pa

from data_pipeline.errors import UserError
from data_pipeline.read.paths import ShardPath, index_option
from data_pipeline.shards import selection
from data_pipeline.shards.fingerprint import PHASH_BITS
from data_pipeline.shards.index import OK, read_facts, sidecar_path
from data_pipeline.shards.merge import source_digest
from data_pipeline.shards.query import COLUMNS, MOST_NEAR_BITS, UNIQUE
from data_pipeline.shards.selection import Selection
from data_pipeline.shards.source import ShardSource

MEMORY = "4GB"
"""What DuckDB may hold before it goes to disk."""
_COMPARED = {
    "text": "nullif(text_digests, [])",
    "image": "nullif(image_digests, [])",
    "looks": "CASE WHEN images > 0 AND list_count(phashes) = images THEN phashes END",
}
"""What samples are compared by; null where there is nothing to compare."""
_BATCH = 1 << 20


def select(
    source: ShardPath,
    index_dir: Path | None,
    where: str,
    unique: Sequence[str],
    near_bits: int,
    made_by: str,
    folder: Path,
    memory: str = MEMORY,
) -> Selection:
    """Writes a selection of a merged source.

    Args:
        source: its folder.
        index_dir: where its index is, if not beside the shards.
        where: SQL expression over `COLUMNS`.
        unique: of `UNIQUE`, applied in this order.
        near_bits: bits in which perceptual hashes of alike pictures may differ.
        made_by: the command, for those who find the selection.
        folder: of the selection; must not exist.
        memory: what DuckDB may hold before it goes to disk.

    Raises:
        UserError: the query is wrong or selects nothing, the index is not merged or has no perceptual hashes, the folder exists.
    """
    unknown = [u for u in unique if u not in UNIQUE]
    if unknown:
        raise UserError(f"--unique {unknown[0]!r} is not known (give one or more of {','.join(UNIQUE)})")
    if not 0 <= near_bits <= MOST_NEAR_BITS:
        raise UserError(f"--near-bits {near_bits} is out of range (give 0 to {MOST_NEAR_BITS})")
    selection.require_new(folder)
    opened = ShardSource(source.name, source, index_dir)
    sidecars = _sidecars(opened, hashes="near-image" in unique)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as spill:
            connection = _connect(sidecars, opened, spill, memory)
            left_out: dict[str, int] = {}
            rows = _rows(connection, where, unique, near_bits, opened.facts.kept, left_out)
            return selection.write(opened, rows, left_out, made_by, folder)
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise UserError(f"cannot query the index of {source}: {_one_line(error)} (free memory and space beside {folder})") from None
    except duckdb.Error as error:
        raise UserError(f"--where: {_one_line(error)} (columns and examples: xc-data select --help)") from None
    except OSError as error:
        raise UserError(f"cannot write the selection {folder}: {error.strerror} (choose another place: -o)") from None


def _sidecars(source: ShardSource, hashes: bool) -> list[Path]:
    """The sidecars that the merge was made of.

    Raises:
        UserError: they changed since, or lack the perceptual hashes that are wanted.
        TryAgainError: the file system failed.
    """
    option = index_option(source.path, source.index_dir)
    sidecars = [sidecar_path(source.path / shard, source.index_dir) for shard in source.facts.shards]
    facts = [read_facts(sidecar) for sidecar in sidecars]
    if not all(facts) or source_digest(facts) != source.facts.digest:
        raise UserError(f"the index of {source.path} changed since it was merged (run: xc-data merge {source.path}{option})")
    bare = [f["shard"] for f in facts if not f["phash"]]
    if hashes and bare:
        raise UserError(
            f"{len(bare)} of {len(facts)} shards of {source.path} have no perceptual hashes, first {bare[0]} "
            f"(run: xc-data index {source.path} --tokenizer FOLDER --phash{option}, then xc-data merge {source.path}{option})"
        )
    return sidecars


def _connect(sidecars: list[Path], source: ShardSource, spill: str, memory: str) -> duckdb.DuckDBPyConnection:
    """A database that holds the view `samples` and may read nothing but what is behind it."""
    files = [str(sidecar.resolve()) for sidecar in sidecars]
    connection = duckdb.connect(config={"memory_limit": memory, "temp_directory": spill, "python_enable_replacements": False})
    connection.execute("SET allowed_paths = $files", {"files": files})
    shards = pa.table({"filename": files, "shard": source.facts.shards, "first_row": source.facts.shard_first_rows})
    connection.from_arrow(shards).create("shards")
    index = connection.read_parquet(files, filename=True, file_row_number=True)
    index.create_view("sidecars")
    columns = ", ".join(f"{made_of} AS {name}" for name, (made_of, _) in COLUMNS.items())
    connection.execute(
        f"CREATE VIEW samples AS SELECT {columns}, first_row + file_row_number AS row, status, elements "
        "FROM sidecars JOIN shards USING (filename)"
    )
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _rows(
    connection: duckdb.DuckDBPyConnection, where: str, unique: Sequence[str], near_bits: int, usable: int, left_out: dict[str, int]
) -> Iterator[np.ndarray]:
    """Selected rows, ascending, in chunks; what each criterion left out goes to `left_out`."""
    chosen = connection.view("samples").filter(f"status = '{OK}'").filter(where)
    chosen.select("row", *(duckdb.SQLExpression(made_of).alias(name) for name, made_of in _COMPARED.items())).create("chosen")
    before = usable
    for criterion in ("where", *unique):
        if criterion == "near-image":
            _keep(connection, "looks", _near_duplicates(connection, near_bits))
        elif criterion in UNIQUE:
            _keep(connection, criterion, np.zeros(0, np.int64))
        ((now,),) = connection.execute("SELECT count(*) FROM chosen").fetchall()
        left_out[criterion] = before - now
        before = now
    batches = connection.execute("SELECT row FROM chosen ORDER BY row").fetch_record_batch(_BATCH)
    for batch in batches:
        yield batch.column(0).to_numpy()


def _keep(connection: duckdb.DuckDBPyConnection, column: str, dropped: np.ndarray) -> None:
    """Keeps, of samples with one value in `column`, the first, unless it is among `dropped`; samples without a value stay."""
    connection.from_arrow(pa.table({"row": dropped})).create("dropped")
    connection.execute(
        f"""
        CREATE TABLE fewer AS SELECT * FROM chosen WHERE {column} IS NULL OR row IN (
            SELECT first FROM (SELECT min(row) AS first FROM chosen WHERE {column} IS NOT NULL GROUP BY {column}) ANTI JOIN dropped
            ON first = dropped.row)
        """
    )
    connection.execute("DROP TABLE dropped; DROP TABLE chosen; ALTER TABLE fewer RENAME TO chosen")


def _near_duplicates(connection: duckdb.DuckDBPyConnection, bits: int) -> np.ndarray:
    """Rows, each the first of its looks, that look like an earlier one which stays.

    Two samples look alike where they have as many images and each pair of them differs in at most `bits` bits. Pairs are found by
    joins: of m bands of the hash at least m - bits are equal, so that every such choice of bands is one join (Manku, Jain and Das
    Sarma, "Detecting near-duplicates for web crawling", WWW 2007). The first image's hash is the one that is joined on.
    """
    connection.execute("CREATE TABLE firsts AS SELECT min(row) AS row, looks FROM chosen WHERE looks IS NOT NULL GROUP BY looks")
    ((count,),) = connection.execute("SELECT count(*) FROM firsts").fetchall()
    connection.execute("CREATE TABLE pairs (earlier BIGINT, later BIGINT)")
    for mask in band_masks(count, bits):
        connection.execute(
            f"""
            INSERT INTO pairs SELECT a.row, b.row FROM firsts a JOIN firsts b
            ON a.looks[1] & {mask}::UBIGINT = b.looks[1] & {mask}::UBIGINT AND len(a.looks) = len(b.looks)
            WHERE a.row < b.row AND bit_count(xor(a.looks[1], b.looks[1])) <= {bits}
            AND list_max([bit_count(xor(pair[1], pair[2])) for pair in list_zip(a.looks, b.looks)]) <= {bits}
            """
        )
    pairs = connection.execute("SELECT DISTINCT earlier, later FROM pairs ORDER BY later").fetchnumpy()
    connection.execute("DROP TABLE pairs; DROP TABLE firsts")
    dropped: set[int] = set()
    for earlier, later in zip(pairs["earlier"].tolist(), pairs["later"].tolist(), strict=True):
        if earlier not in dropped:  # known by now: whatever could drop it comes before it
            dropped.add(later)
    return np.array(sorted(dropped), np.int64)


def band_masks(count: int, bits: int) -> list[int]:
    """Masks of a hash, such that two hashes that differ in at most `bits` bits agree under at least one of them.

    As many bands as make the joins of `count` hashes cheapest: more bands are more joins, with fewer chance meetings each.
    """

    def work(bands: int) -> float:
        return math.comb(bands, bits) * (count + count**2 / 2 ** (PHASH_BITS * (bands - bits) / bands))

    bands = min(range(bits + 1, bits + 6), key=work)
    borders = [PHASH_BITS * i // bands for i in range(bands + 1)]
    masks = [(1 << end) - (1 << first) for first, end in pairwise(borders)]
    return [sum(chosen) for chosen in combinations(masks, bands - bits)]


def _one_line(error: Exception) -> str:
    """What DuckDB says, without the quotation of our query."""
    return " ".join(str(error).partition("\n\nLINE")[0].split())[:300]
