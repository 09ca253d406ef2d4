"""Where a source lies: a local folder or a URL. The only place that tells them apart by their spelling."""

from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.read.remote import Patience, RemotePath, RemoteStore

ShardPath = Path | RemotePath
"""A folder of shards, or a shard."""

SCHEMES = ("http", "https", "s3", "gs")


def to_path(where: str | Path | RemotePath, patience: Patience | None = None) -> ShardPath:
    """The folder that `where` names.

    Raises:
        UserError: a scheme that nothing here reads.
    """
    if isinstance(where, Path | RemotePath):
        return where
    scheme, separator, rest = where.partition("://")
    if not separator:
        return Path(where)
    if scheme not in SCHEMES or not rest.strip("/"):
        raise UserError(f"{where}: shards cannot be read there (give a folder, or a URL: {', '.join(f'{s}://' for s in SCHEMES)})")
    url = where.rstrip("/")
    folder = url.rpartition("/")[0] if url.endswith(".txt") else url
    return RemotePath(url, RemoteStore(folder, patience or Patience()))


def index_option(source: ShardPath, index_dir: Path) -> str:
    """What a cure adds to a command about a source whose index is not beside its shards; begins with a space."""
    return "" if index_dir == source else f" --index-dir {index_dir}"


def index_folder(source: ShardPath, index_dir: str | Path | None) -> Path:
    """Where the index of a source is: beside its shards unless told otherwise.

    Raises:
        UserError: nothing can be written beside remote shards.
    """
    if index_dir:
        return Path(index_dir)
    if isinstance(source, RemotePath):
        raise UserError(f"{source}: a remote source keeps its index in a local folder (name it: --index-dir, or index_dir in the config)")
    return source
