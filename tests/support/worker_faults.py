"""Faults of data workers: they stand in for `begin_worker`, since a worker inherits nothing that a test has patched."""

import os
import signal
from dataclasses import dataclass

from data_pipeline.processes import begin_worker
from data_pipeline.read import storage


class FailingReads:
    """`os` whose reads time out."""

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def pread(self, *_: object) -> bytes:
        raise OSError(110, "Connection timed out")


def begin_failing(number: int) -> None:
    """A worker whose file system fails."""
    begin_worker(number)
    storage.os = FailingReads()


@dataclass(frozen=True)
class Deadly:
    """Begins workers that die of the sample of a key."""

    key: str

    def __call__(self, number: int) -> None:
        begin_worker(number)
        real = storage.read_members

        def read_members(data: bytes) -> dict[str, bytes]:
            if data.startswith(tuple(f"{self.key}.{end}".encode() for end in ("txt", "jpg", "webp"))):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(data)

        storage.read_members = read_members
