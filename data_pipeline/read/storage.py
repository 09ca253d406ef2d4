"""Bytes of samples, from local shards by `pread` and from remote ones by byte ranges.

Invariant: a read returns exactly the bytes that were indexed, or raises. A shard that changed is bad data
(it fails again); a failure of file system or network may pass and never drops data.
"""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.errors import TryAgainError
from data_pipeline.read.cache import RangeCache
from data_pipeline.read.remote import OtherSizeError, RemotePath
from data_pipeline.samples import BadSample, Element, Kind, parse
from data_pipeline.shards.index import sample_digest
from data_pipeline.shards.source import Location
from data_pipeline.shards.tar import read_members

OPEN_SHARDS = 128
"""Shards that a worker keeps open."""
REQUESTS_AT_ONCE = 16
"""Ranges that a worker asks for together: a pack's samples, so that one round trip is waited for and not one a sample."""


class ShardReader:
    """Reads byte ranges, keeping the most recent local shards open, and closing them when it goes; one a worker."""

    def __init__(self, cache: RangeCache | None = None) -> None:
        self._cache = cache
        self._open: OrderedDict[Path, tuple[int, int]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None

    def read(self, location: Location) -> bytes:
        """The bytes of a sample.

        Raises:
            BadSample: the shard is gone, was replaced or cut since it was indexed.
            TryAgainError: the file system or the network failed.
            UserError: a store refuses the credentials.
        """
        if isinstance(location.shard, RemotePath):
            return self._read_remote(location.shard, location)
        data = self._read_local(location.shard, location)
        # a tar's size is rounded up to 10 KB, so that another shard may well have the same
        if not _is_indexed(data, location):
            raise BadSample("bytes changed since they were indexed")
        return data

    def read_all(self, locations: Sequence[Location]) -> list[bytes | BadSample]:
        """The bytes of several samples, remote ones asked for together; a bad sample is returned in its place.

        Raises:
            TryAgainError, UserError: as `read`.
        """
        once = list(dict.fromkeys(locations))
        if sum(isinstance(location.shard, RemotePath) for location in once) > 1:
            self._threads = self._threads or ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="read")
            found = dict(zip(once, self._threads.map(self._read_or_bad, once), strict=True))
        else:
            found = {location: self._read_or_bad(location) for location in once}
        return [found[location] for location in locations]

    def _read_or_bad(self, location: Location) -> bytes | BadSample:
        try:
            return self.read(location)
        except BadSample as bad:
            return bad

    def _read_local(self, shard: Path, location: Location) -> bytes:
        try:
            descriptor, size = self._descriptor(shard)
            if size != location.shard_size:
                raise BadSample(f"shard changed since it was indexed: {size} bytes, not {location.shard_size}")
            data = os.pread(descriptor, location.size, location.offset)
        except FileNotFoundError:
            raise BadSample("shard is missing") from None
        except OSError as error:
            raise TryAgainError(f"{shard}: {error.strerror}") from None
        if len(data) != location.size:
            raise BadSample(f"shard cut short: {len(data)} of {location.size} bytes")
        return data

    def _read_remote(self, shard: RemotePath, location: Location) -> bytes:
        if self._cache is not None:
            data = self._cache.get(location.digest, location.size)
            if data is not None and _is_indexed(data, location):
                return data
        reason = ""
        for _ in range(2):  # what is wrong once may have been spoilt on its way
            try:
                data = shard.read_range(location.offset, location.size, location.shard_size)
            except FileNotFoundError:
                reason = "shard is missing"
            except OtherSizeError as error:
                reason = f"shard changed since it was indexed: {error}"
            else:
                reason = "bytes changed since they were indexed"
                if _is_indexed(data, location):
                    if self._cache is not None:
                        self._cache.put(location.digest, data)
                    return data
        raise BadSample(reason)

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
        return {"_cache": self._cache, "_open": OrderedDict(), "_threads": None}

    def __del__(self) -> None:
        for descriptor, _ in getattr(self, "_open", {}).values():
            os.close(descriptor)


def elements_of(kind: Kind, data: bytes) -> list[Element]:
    """The parsed elements of a sample that was read.

    Raises:
        BadSample: its bytes cannot be used.
    """
    try:
        members = read_members(data)
    except tarfile.TarError as error:
        raise BadSample(f"unreadable tar: {error}") from None
    return parse(kind, members)


def _is_indexed(data: bytes, location: Location) -> bool:
    return int.from_bytes(sample_digest(data)[:8], "little") == location.digest
