"""Folders that img2dataset wrote as webdataset: they are shards already, so that nothing is written but an index.

Invariant: nothing in the folder is touched; its side files (NAME.parquet, NAME_stats.json) are not read as data.
"""

from pathlib import Path

from data_pipeline.shards.index import list_shards


def unfinished(source: Path) -> list[str]:
    """Shards that img2dataset did not finish, by name: it writes NAME_stats.json when it has.

    Raises:
        UserError: no shard is there.
    """
    return [shard.name for shard in list_shards(source) if not shard.with_name(f"{shard.stem}_stats.json").exists()]
