"""Shards indexed one by one, with the demo's tokenizer and without a command line."""

from pathlib import Path

from tars import make_pairs, write_tar

from data_pipeline.samples import Kind
from data_pipeline.shards.index import OK, index_shard, read_index, sidecar_path
from data_pipeline.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).resolve().parents[2] / "examples" / "demo" / "tokenizer")
PAIRS = 6


def write_pairs(folder: Path) -> Path:
    """A shard of PAIRS good pairs."""
    return write_tar(folder / "a.tar", make_pairs(PAIRS))


def statuses(shard: Path, kind: Kind = Kind.pair) -> list[tuple[str, str]]:
    """(key, status) of every row of the shard's new index."""
    index_shard(shard, shard.parent, kind, TOKENIZER)
    table = read_index(sidecar_path(shard, shard.parent)).table
    return list(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))


def kept(shard: Path, kind: Kind = Kind.pair) -> list[str]:
    """Keys of the samples that can be used."""
    return [key for key, status in statuses(shard, kind) if status == OK]
