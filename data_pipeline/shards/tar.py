"""Walks a tar as WebDataset reads it: members with one key, side by side, are a sample; names that have no key are passed over.

Invariant: a damaged tar yields every whole sample before the damage and then says what is wrong and where; only the file system's own
errors are raised, since they may pass. Nothing is ever extracted to the file system.
"""

import errno
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, BinaryIO

from data_pipeline.read.paths import ShardPath

BLOCK = 512
SAMPLE_LIMIT = 1 << 28
"""Largest sample in bytes, headers included: it is read into memory whole."""
HEADER_LIMIT = 1 << 14
"""Largest extended header (PAX, GNU long name) in bytes: tarfile reads it whole and searches it in quadratic time."""
NAME_LIMIT = 4096
"""Longest name of a member in characters, as file systems have it: it goes into the index, ledgers and messages."""


@dataclass
class RawSample:
    """A sample's place in its tar."""

    key: str
    offset: int
    """First byte of its first header."""
    end: int
    """One past the last byte of its last member, padding included."""
    members: list[tuple[str, int, int]] = field(default_factory=list)
    """(extension, offset in the tar, size in bytes), in order; not complete where there is damage."""
    damage: str = ""
    """Why it cannot be used whatever its members hold; those after it can."""


@dataclass
class Damage:
    """What is wrong with a tar from `offset` on."""

    offset: int
    reason: str
    key: str = ""
    """The sample that it cut, where that is known."""


_META = re.compile(r"__[^/]*__($|/)")
"""What WebDataset keeps for its own use."""
_OCTAL = re.compile(rb"[0-7]{11}[ \0]")
_UNREADABLE = (tarfile.TarError, EOFError, OSError, ValueError, IndexError, OverflowError, MemoryError, RecursionError)
"""What tarfile raises where headers lie: sizes that no memory holds, chains of headers, seeks to nowhere."""


class _Header(tarfile.TarInfo):
    """A header that does not make tarfile read without bound."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and not 0 <= self.size <= HEADER_LIMIT:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)


_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def _open(file: IO[bytes]) -> tarfile.TarFile:
    # names that are not UTF-8 must still be names that an index can hold
    return tarfile.TarFile(fileobj=file, mode="r", tarinfo=_Header, errorlevel=1, encoding="utf-8", errors="backslashreplace")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, by WebDataset's rule: the key ends at the first dot of the last path component.

    None for a name that WebDataset passes over: without a dot (README), with nothing before it (./._7.jpg, which macOS writes beside
    ./7.jpg; but in folder/._7.jpg `folder/` is the key), or of its own metadata (__x__/7.jpg). There `^((?:.*/|)[^.]+)[.]([^/]*)$`
    finds the key, in a time that is quadratic in slashes; this is the same in linear time.
    """
    dot = name.find(".", name.rfind("/") + 1)
    if dot < 1 or _META.match(name):
        return None
    before = name.rfind(".", 0, dot)
    if before >= 0:  # the key's last part, which may hold slashes but no dot, begins behind a slash
        slash = name.find("/", before + 1, dot - 1)
        if slash < 0 or "\n" in name[:slash]:
            return None
    return name[:dot], name[dot + 1 :].lower()


def _split_any(name: str) -> tuple[str, str] | None:
    """As `split_name`, of a name that may be too long: such a one is not passed over, it is damage."""
    short = name[:NAME_LIMIT]
    return split_name(short) or ((short, "") if len(name) > NAME_LIMIT else None)


def walk(path: ShardPath) -> Iterator[RawSample | Damage]:
    """The samples of a tar in order; a `Damage`, if any, comes last.

    Raises:
        OSError: the file system failed.
    """
    with path.open("rb") as file:
        yield from walk_file(file, path.stat().st_size)


def walk_file(file: BinaryIO, size: int) -> Iterator[RawSample | Damage]:
    """As `walk`, of an open tar of `size` bytes; between two samples the caller may read and seek in it."""
    current: RawSample | None = None
    extensions: set[str] = set()
    position = 0
    try:
        tar = _open(file)
        while (member := tar.next()) is not None:
            position = member.offset
            end = tar.offset
            tar.members.clear()  # tarfile remembers every member; a shard may hold millions
            if member.size < 0 or end <= member.offset:
                yield from _flush(current)
                yield Damage(member.offset, f"unreadable tar: {member.name[:80]!r} has {member.size} bytes")
                return
            if member.offset_data + member.size > size:
                cut = _split_any(member.name)
                yield from _flush(current, drop=cut and cut[0])
                yield Damage(member.offset, f"truncated tar: {member.name[:80]!r} ends past the end of the file", cut[0] if cut else "")
                return
            position = min(end, size)  # what is no plain file may claim to end anywhere
            names = _split_any(member.name)
            if member.isdir() or names is None:
                continue
            key, extension = names
            # a second member of one name begins the key anew: two samples that share a key, side by side
            if current is None or current.key != key or extension in extensions:
                yield from _flush(current)
                current, extensions = RawSample(key, member.offset, end), set()
            current.end = min(end, size)
            current.damage = current.damage or _objection(member, current)
            if not current.damage:
                extensions.add(extension)
                current.members.append((extension, member.offset_data, member.size))
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        yield from _flush(current)
        yield Damage(position, f"unreadable tar: {str(error) or type(error).__name__}")
        return
    yield from _flush(current)
    reason = _judge_end(file, position)
    if reason:
        yield Damage(position, reason)


def read_members(data: bytes) -> dict[str, bytes]:
    """Members of one sample by extension, from the bytes of its range.

    Raises:
        tarfile.TarError: the bytes are not that of whole members.
    """
    data += bytes(-len(data) % BLOCK)  # a tar that was cut in its last padding still holds the whole member
    plain = _plain_members(data)
    if plain is not None:
        return plain
    members: dict[str, bytes] = {}
    with _open(io.BytesIO(data)) as tar:
        for member in tar:
            names = split_name(member.name)
            if member.isfile() and names is not None:
                members[names[1]] = data[member.offset_data : member.offset_data + member.size]
    return members


def _plain_members(data: bytes) -> dict[str, bytes] | None:
    """The members, where all are plain files with short ASCII names; None where tarfile is to judge. A twentieth of tarfile's time."""
    members: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        header = data[at : at + BLOCK]
        name, size = header[:100].rstrip(b"\0"), header[124:136]
        plain = header[156:157] in (b"0", b"\0") and header[345:346] == b"\0"  # a file; no prefix to its name
        if not plain or not name.isascii() or b"\0" in name or name.endswith(b"/") or not _OCTAL.fullmatch(size):
            return None
        begin, length = at + BLOCK, int(size[:11], 8)
        if begin + length > len(data):
            return None
        names = split_name(name.decode())
        if names is not None:
            members[names[1]] = data[begin : begin + length]
        at = begin + length + -length % BLOCK
    return members or None


def _objection(member: tarfile.TarInfo, sample: RawSample) -> str:
    """Why a member makes its sample one that cannot be used; empty where it does not."""
    if not member.isfile() or member.issparse():
        return f"not a plain file: {member.name[:80]!r} is a link, a device or sparse"
    if len(member.name) > NAME_LIMIT:
        return f"name too long: {len(member.name)} characters"
    if sample.end - sample.offset > SAMPLE_LIMIT:
        return f"sample too large: over {SAMPLE_LIMIT} bytes"
    return ""


def _flush(sample: RawSample | None, drop: str | None = None) -> Iterator[RawSample]:
    """The finished sample, unless the damage cut one of its own members."""
    if sample is not None and sample.key != drop:
        yield sample


def _judge_end(file: BinaryIO, position: int) -> str | None:
    """What is wrong at the place where tarfile found no further member; None at an end marker with nothing behind it."""
    file.seek(position)
    tail = file.read(BLOCK)
    if not tail:
        return "truncated tar: no end marker"
    if tail.strip(b"\0"):
        return "truncated tar: a header is cut" if len(tail) < BLOCK else "garbage between members"
    while tail:
        if tail.strip(b"\0"):
            return "data after the end marker: zero bytes between members, or several tars in one file"
        tail = file.read(1 << 20)
    return None
