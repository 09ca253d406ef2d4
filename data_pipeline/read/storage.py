"""Bytes of shards on a local or shared file system.

Invariant: a read returns exactly the bytes asked for, of the shard that was indexed, or raises. A shard that changed is bad data
(it fails again); an input error of the file system may pass and never drops data.
"""

import os
from collections import OrderedDict
from pathlib import Path

from data_pipeline.errors import TryAgainError
from data_pipeline.samples import BadSample
from data_pipeline.shards.index import sample_digest
from data_pipeline.shards.source import Location

OPEN_SHARDS = 128
"""Shards that a worker keeps open."""


class ShardReader:
    """Reads byte ranges by `pread`, keeping the most recent shards open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, tuple[int, int]] = OrderedDict()

    def read(self, location: Location) -> bytes:
        """The bytes of a sample.

        Raises:
            BadSample: the shard is gone, was replaced or cut since it was indexed.
            TryAgainError: the file system failed.
        """
        try:
            descriptor, size = self._descriptor(location.shard)
            if size != location.shard_size:
                raise BadSample(f"shard changed since it was indexed: {size} bytes, not {location.shard_size}")
            data = os.pread(descriptor, location.size, location.offset)
        except FileNotFoundError:
            raise BadSample("shard is missing") from None
        except OSError as error:
            raise TryAgainError(f"{location.shard}: {error.strerror}") from None
        if len(data) != location.size:
            raise BadSample(f"shard cut short: {len(data)} of {location.size} bytes")
        # a tar's size is rounded up to 10 KB, so that another shard may well have the same
        if int.from_bytes(sample_digest(data)[:8], "little") != location.digest:
            raise BadSample("bytes changed since they were indexed")
        return data

    def _descriptor(self, shard: Path) -> tuple[int, int]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        descriptor = os.open(shard, os.O_RDONLY)
        self._open[shard] = descriptor, os.fstat(descriptor).st_size
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {"_open": OrderedDict()}
