"""Shards behind http(s)://, s3:// and gs://, as paths that know the part of `pathlib.Path` that reading a source takes.

Invariant: a read returns exactly the bytes asked for or raises. What may pass is tried again with back-off until a deadline and then is
`TryAgainError`; only what fails the same way whenever it is asked (no such object, another size) is told of the data.
"""

import errno
import io
import multiprocessing
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatchcase
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from data_pipeline.errors import TryAgainError, UserError

NAMES_FILE = "shards.txt"
"""Names of the shards, one a line, where a web server cannot be asked for them."""

Result = TypeVar("Result")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
"""Seconds between tries: doubled each time, and shortened at random, so that workers do not ask in step."""
_RANDOM = random.SystemRandom()
"""The generator of `random` is seeded alike in the k-th worker of every rank."""
_CHUNK = 8 << 20
_CHUNKS_KEPT = 4
_opened_by: list[int] = []
"""The process that made the first client: its threads do not survive a fork, and a read in the child would wait for them for ever."""


@dataclass(frozen=True)
class Patience:
    """How long a read waits, in seconds."""

    stall: float = 20.0
    """Without a byte for this long, a request is cut and sent again."""
    deadline: float = 300.0
    """After this long without success, the life ends with "try again"."""


class OtherSizeError(Exception):
    """The object is not the one that was indexed; the message says its size."""


def worker_context(preload: str | None = None) -> BaseContext:
    """How to begin processes that may read remote shards: by a fork, or where this process has clients, by a server that has none.

    `preload` names a module that the server imports once for all of them.
    """
    if not _opened_by:
        return multiprocessing.get_context()
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload([preload])
    return context


class RemoteStore:
    """A folder of an object store or web server. Its client is made by the process that reads, on the first read."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience = url, patience
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The `obstore` store of this process."""
        if self._client is None or _opened_by != [os.getpid()]:
            if _opened_by and _opened_by != [os.getpid()]:
                raise RuntimeError("a process that was forked from a reader of remote shards cannot read them")
            _opened_by[:] = [os.getpid()]
            stall = timedelta(seconds=self.patience.stall)
            options = {
                "allow_http": not self.url.startswith("https:"),
                "connect_timeout": stall,
                "read_timeout": stall,
                "timeout": timedelta(seconds=max(self.patience.stall, self.patience.deadline)),
            }
            try:
                # one loop of retries, below, covers bodies too, and its deadline is that of the whole read
                self._client = from_url(self.url, client_options=options, retry_config={"max_retries": 0})
            except (BaseError, ValueError) as error:
                raise UserError(f"{self.url}: {_one_line(error)} (check the URL and the store's environment variables)") from None
        return self._client

    def ask(self, what: str, request: Callable[[Any], Result]) -> Result:
        """The answer to `request(client)`, tried again with back-off until the deadline.

        Raises:
            FileNotFoundError: there is no such object.
            UserError: the store refuses these credentials, or cannot do what is asked.
            TryAgainError: no answer within the deadline.
        """
        end, pause = time.monotonic() + self.patience.deadline, _FIRST_PAUSE
        while True:
            try:
                return request(self.client)
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "no such object", what) from None
            except NotSupportedError as error:
                raise UserError(f"{what}: {_one_line(error)} (shards are read from servers that know byte ranges)") from None
            except (BaseError, OSError) as error:
                if time.monotonic() + pause > end:
                    raise self._give_up(what, error) from None
            time.sleep(pause * _RANDOM.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _give_up(self, what: str, error: Exception) -> UserError | TryAgainError:
        if isinstance(error, PermissionDeniedError | UnauthenticatedError):
            return UserError(f"{what}: access denied (check the credentials in the environment)")
        return TryAgainError(f"{what}: no answer in {self.patience.deadline:g} s: {_one_line(error)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}


@dataclass(frozen=True)
class RemoteStat:
    """What `os.stat_result` says of a file, as far as it is asked."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """A folder of shards, a file that lists its shards (`*.txt`), or one shard."""

    url: str
    store: RemoteStore = field(compare=False, repr=False)
    listed: RemoteStat | None = field(default=None, compare=False, repr=False)
    """What a listing said of it."""

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder."""
        return RemotePath(self.store.url, self.store)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.store.url}/{name}", self.store)

    def __str__(self) -> str:
        return self.url

    def resolve(self) -> "RemotePath":
        """Itself: a URL is absolute."""
        return self

    def is_dir(self) -> bool:
        """True: object stores have no folders, and asking a web server for one says nothing."""
        return True

    def stat(self) -> RemoteStat:
        """Size and time of the object.

        Raises:
            FileNotFoundError, UserError, TryAgainError: see `RemoteStore.ask`.
        """
        return self.listed or _stat(self.store.ask(self.url, lambda client: obstore.head(client, self.name)))

    def glob(self, pattern: str) -> list["RemotePath"]:
        """The folder's objects that match, from the list of names or else from the store's own listing.

        Raises:
            UserError: a web server has no list of names, or the list holds something else, or a name twice.
            TryAgainError: no answer within the deadline.
        """
        listed = self.url != self.store.url
        if listed or self.url.startswith("http"):
            names = self._names(self.name if listed else NAMES_FILE)
            return [self / name for name in names if fnmatchcase(name, pattern)]
        found = self.store.ask(self.url, obstore.list_with_delimiter)["objects"]
        paths = ((o["path"].rpartition("/")[2], o) for o in found)
        return [RemotePath(f"{self.url}/{name}", self.store, _stat(o)) for name, o in paths if fnmatchcase(name, pattern)]

    def read_range(self, offset: int, size: int, of: int) -> bytes:
        """`size` bytes from `offset` on, of an object of `of` bytes.

        Raises:
            OtherSizeError: the object has another size.
            FileNotFoundError, UserError, TryAgainError: see `RemoteStore.ask`.
        """

        def request(client: Any) -> bytes:
            try:
                found = obstore.get(client, self.name, options={"range": (offset, offset + size)})
                now, data = found.meta["size"], found.bytes().to_bytes()
            except BaseError as error:
                if "416" not in str(error):  # the status of a range past the end; how that is told differs by store
                    raise
                now, data = obstore.head(client, self.name)["size"], b""
                if now == of:
                    raise
            if now != of:
                raise OtherSizeError(f"{now} bytes, not {of}")
            if len(data) != size:
                raise ConnectionError(f"{len(data)} of {size} bytes came")
            return data

        return self.store.ask(self.url, request) if size else b""

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object as a file for reading forward: each byte is asked for once, in large pieces; small steps back are free."""
        if mode != "rb":
            raise ValueError(f"{self.url} can only be read")
        return io.BufferedReader(_RemoteFile(self), 1 << 16)

    def _names(self, file: str) -> list[str]:
        where = f"{self.store.url}/{file}"
        try:
            text = self.store.ask(where, lambda client: obstore.get(client, file).bytes().to_bytes())
            lines = text.decode().splitlines()
        except FileNotFoundError:
            raise UserError(f"no {where} (a web server lists nothing: put the shards' names there, one a line)") from None
        except UnicodeDecodeError:
            raise UserError(f"{where} is not text (it holds the shards' names, one a line)") from None
        first: dict[str, int] = {}
        for number, name in enumerate((line.strip() for line in lines), 1):
            if "/" in name:
                raise UserError(f"{where}: {name!r} is not the name of a file beside it (one folder is one source)")
            if name and first.setdefault(name, number) != number:
                raise UserError(f"{where} line {number}: {name!r} stands in line {first[name]} already (remove one: a shard is read once)")
        return list(first)


class _RemoteFile(io.RawIOBase):
    """Reads through chunks, the last few of which are kept."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._size, self._at = path, path.stat().st_size, 0
        self._chunks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "negative seek position")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._at >= self._size:
            return 0
        number, within = divmod(self._at, _CHUNK)
        part = memoryview(self._chunk(number))[within : within + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _chunk(self, number: int) -> bytes:
        if number not in self._chunks:
            first = number * _CHUNK
            try:
                self._chunks[number] = self._path.read_range(first, min(_CHUNK, self._size - first), self._size)
            except OtherSizeError as error:
                raise TryAgainError(f"{self._path} changed while it was read: {error}") from None
            while len(self._chunks) > _CHUNKS_KEPT:
                self._chunks.popitem(last=False)
        return self._chunks[number]


def _stat(meta: Any) -> RemoteStat:
    return RemoteStat(meta["size"], int(meta["last_modified"].timestamp()) * 10**9)


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
