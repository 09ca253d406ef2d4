"""A node-local cache of remote byte ranges, named by the digest of their bytes; shared by all processes of a node.

Invariant: a file appears whole or not at all and never changes, and a reader checks its digest; so no process needs to know of another,
and losing any file costs one request. Its size stays near the limit, since each folder throws out what was used longest ago.
"""

import os
import uuid
from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import UserError

FOLDERS = 256
"""Ranges are spread over folders by their digest; each keeps its share of the limit, so that only one is looked through at a time."""
_LOOKS = 32
"""A folder is looked through this often while its share is written once."""
_LOW_WATER = 0.8
"""What is left of a folder's share after it is cleared, so that clearing is rare and the looks between do not overshoot."""


class RangeCache:
    """Files below `folder`, together about `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Makes the folder.

        Raises:
            UserError: it cannot be written.
        """
        self.folder, self._share = folder, max(1, limit // FOLDERS)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot make {folder}: {error.strerror} (choose a folder on a local disk)") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"data.cache_dir: {folder} cannot be written (choose a folder on a local disk)")

    def get(self, digest: int, size: int) -> bytes | None:
        """The bytes kept under this digest, unchecked; None where there are none."""
        path = self._path(digest, size)
        try:
            data = path.read_bytes()
            os.utime(path)  # the time of its last use
        except OSError:
            return None
        return data

    def put(self, digest: int, data: bytes) -> None:
        """Keeps the bytes. Never fails: a full or broken disk makes the cache smaller, no more."""
        path = self._path(digest, len(data))
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
            partial.replace(path)
            # by digest, not by a count: the looks keep pace with what all processes write together
            if digest // FOLDERS % max(1, self._share // _LOOKS // max(1, len(data))) == 0:
                self._clear(path.parent)
        except OSError:
            with suppress(OSError):
                partial.unlink()

    def _path(self, digest: int, size: int) -> Path:
        return self.folder / f"{digest % FOLDERS:02x}" / f"{digest:016x}-{size}"

    def _clear(self, folder: Path) -> None:
        """Throws out the files used longest ago, down to the low water mark, where the folder holds more than its share."""
        found = []
        for entry in os.scandir(folder):
            try:
                facts = entry.stat()
            except FileNotFoundError:  # another process threw it out
                continue
            found.append((facts.st_mtime_ns, facts.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        if used <= self._share * (1 + _LOW_WATER) / 2:
            return
        for _, size, path in sorted(found):
            if used <= self._share * _LOW_WATER:
                return
            Path(path).unlink(missing_ok=True)
            used -= size
