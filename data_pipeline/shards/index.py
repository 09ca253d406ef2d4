"""The sidecar index of one shard: what each sample is, where it lies, how long it is, and whether it can be used.

Invariant: a sidecar exists whole or not at all, and describes exactly the bytes whose size and time it records. Damage is a row with
a status, never an exception.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline.errors import UserError, cannot_read
from data_pipeline.read.paths import ShardPath, index_option
from data_pipeline.samples import BadSample, ImageElement, Kind, TextElement, guess_kind, image_size, parse
from data_pipeline.shards import fingerprint
from data_pipeline.shards.tar import Damage, RawSample, walk_file
from data_pipeline.text.templates import encode
from data_pipeline.text.tokenizer import Tokenizer

VERSION = 4
SUFFIX = ".index.parquet"
OK = "ok"
DUPLICATE = "duplicate key"
REASON_LIMIT = 300
"""Longest status in characters: it may quote what the damage left."""

_ELEMENT = pa.struct(
    [
        ("tokens", pa.int32()),
        ("width", pa.uint16()),
        ("height", pa.uint16()),
        ("digest", pa.binary(fingerprint.DIGEST_BYTES)),
        ("phash", pa.uint64()),
    ]
)
"""What the plan needs (`plan.columns.ELEMENT`), then what curation compares. `phash` is null for texts and flat pictures, and where it
was not asked for."""
_MEMBER = pa.struct([("extension", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("members", pa.list_(_MEMBER)),
        ("elements", pa.list_(_ELEMENT)),
        ("digest", pa.binary(16)),
        ("status", pa.string()),
    ]
)


@dataclass
class ShardIndex:
    """A sidecar in memory: its facts and its table (`SCHEMA`)."""

    facts: dict[str, Any]
    table: pa.Table


def sidecar_path(shard: ShardPath, index_dir: Path) -> Path:
    """Where the sidecar of `shard` lies."""
    return index_dir / (shard.name.removesuffix(".tar") + SUFFIX)


def list_shards(source: ShardPath) -> list[ShardPath]:
    """The shards of a source in the order of their names.

    Raises:
        UserError: no such folder, or no shard in it.
        TryAgainError: the folder cannot be read now.
    """
    try:
        if not source.is_dir():
            raise UserError(f"no such shard folder: {source.resolve()} (give the folder that holds the .tar shards)")
        if isinstance(source, Path):
            os.scandir(source).close()  # raises where `glob` finds nothing for want of rights
        shards = sorted(source.glob("*.tar"))
    except OSError as error:
        raise cannot_read(source, error) from None
    if not shards:
        raise UserError(f"no .tar shard in {source.resolve()} (a source is a folder of WebDataset tars)")
    return shards


def find_kind(shards: list[ShardPath]) -> Kind:
    """The kind of a source, from its first sample that has one.

    Raises:
        UserError: no sample looks like anything known.
        TryAgainError: a shard cannot be read now.
    """
    for shard in shards:
        try:
            kind = _kind_of(shard)
        except OSError as error:
            raise cannot_read(shard, error) from None
        if kind is not None:
            return kind
    raise UserError(
        f"no usable sample in {shards[0].parent} (pairs need an image and .txt, documents and conversations .json, text .txt; see --kind)"
    )


def _kind_of(shard: ShardPath) -> Kind | None:
    with shard.open("rb") as file:
        for sample in walk_file(file, shard.stat().st_size):
            if isinstance(sample, RawSample) and not sample.damage:
                file.seek(sample.offset)
                kind = guess_kind(_members(sample, file.read(sample.end - sample.offset)))
                if kind is not None:
                    return kind
    return None


def index_shard(shard: ShardPath, index_dir: Path, kind: Kind, tokenizer: Tokenizer, phash: bool = False) -> bool:
    """Writes the sidecar of one shard; returns False where a sidecar that still holds was found.

    With `phash`, pictures are decoded and their perceptual hashes kept, and those that do not decode are damage. A sidecar that has
    the hashes holds also where they are not asked for.

    Raises:
        UserError: the index folder cannot be written, or holds the index of another source.
        TryAgainError: the shard cannot be read now; nothing is written, since a failure that may pass is not damage.
    """
    target = sidecar_path(shard, index_dir)
    try:
        facts = _facts(shard, kind, tokenizer)
        found = read_facts(target) if target.exists() else {}
        if _same(found, facts) and (found["phash"] or not phash):
            return False
        source = str(shard.parent.resolve())
        if index_dir.resolve() != shard.parent.resolve():
            require_own(target, found, source)
            facts["source"] = source
        table = pa.Table.from_pylist(list(_rows(shard, kind, tokenizer, phash)), schema=SCHEMA)
    except OSError as error:
        raise cannot_read(shard, error) from None
    facts["phash"] = phash
    facts["digest"] = _content_digest(table)
    table = table.replace_schema_metadata({"facts": json.dumps(facts)})
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        index_dir.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):  # a read-only file system refuses to remove even what is not there
            partial.unlink()
        raise UserError(f"cannot write the index {target}: {error.strerror} (free space, or choose another folder: --index-dir)") from None
    return True


def require_own(sidecar: Path, found: dict[str, Any], source: str) -> None:
    """Refuses what `read_facts` found in a sidecar of another source than this one, the resolved folder of its shards.

    Raises:
        UserError: whose it is.
    """
    owner = found.get("source", str(sidecar.parent.resolve())) if found else source  # beside its shards it names none
    if owner != source:
        cure = f"give each source an --index-dir of its own, or delete {sidecar.parent} if {owner} has moved"
        raise UserError(f"{sidecar} is the index of a shard of {owner}, not of {source} ({cure})")


def read_facts(sidecar: Path) -> dict[str, Any]:
    """What a sidecar says of itself; empty where there is none, or it is not a sidecar of this program.

    Raises:
        TryAgainError: the file system failed.
    """
    try:
        metadata = pq.read_schema(sidecar).metadata or {}
        return json.loads(metadata.get(b"facts", b"{}"))
    except (FileNotFoundError, ValueError, pa.ArrowException):
        return {}
    except OSError as error:
        _require_damage(sidecar, error)
        return {}


def require_facts(sidecar: Path, source: ShardPath | None = None) -> dict[str, Any]:
    """As `read_facts`, of a sidecar that is to be there; `source` is the folder of its shards, by default its own.

    Raises:
        UserError: it is missing or was not written by this program.
        TryAgainError: the file system failed.
    """
    facts = read_facts(sidecar)
    if facts.get("version") != VERSION:
        shards = source or sidecar.parent
        raise UserError(f"no index {sidecar} (run: xc-data index {shards} --tokenizer FOLDER{index_option(shards, sidecar.parent)})")
    return facts


def read_index(sidecar: Path, source: ShardPath | None = None, columns: list[str] | None = None) -> ShardIndex:
    """A sidecar, with all columns of `SCHEMA` or with these; `source` as for `require_facts`.

    Raises:
        UserError: it is missing or damaged, or was not written by this program.
        TryAgainError: the file system failed.
    """
    facts = require_facts(sidecar, source)
    try:
        return ShardIndex(facts, pq.read_table(sidecar, columns=columns))
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError):
            _require_damage(sidecar, error)
        raise UserError(f"the index {sidecar} is damaged: {str(error).splitlines()[0]} (delete it, then run xc-data index again)") from None


def _require_damage(sidecar: Path, error: OSError) -> None:
    """Arrow has OSError for damage as well; only one of the file system has a number."""
    if error.errno is not None:
        raise cannot_read(sidecar, error) from None


def sample_digest(data: bytes) -> bytes:
    """Digest of a sample's bytes, headers and padding included: 16 bytes, of which the plan's columns keep the first 8.

    It tells rot and replaced shards, not forgers, at 40 times the speed of a cryptographic one: readers take it of every sample.
    """
    return xxhash.xxh3_128_digest(data)


def _facts(shard: ShardPath, kind: Kind, tokenizer: Tokenizer) -> dict[str, Any]:
    stat = shard.stat()
    return {
        "version": VERSION,
        "shard": shard.name,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "kind": kind.value,
        "tokenizer": tokenizer.digest,
    }


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(found.get(k) == v for k, v in wanted.items())


def _content_digest(table: pa.Table) -> str:
    """Digest of what a plan depends on, free of paths and times, so that a copied shard is the same shard. Of damage only the kind counts:
    what follows is quoted from libraries, whose words change with their versions.
    """
    digest = hashlib.sha256()
    for row in table.select(["key", "offset", "size", "digest", "elements", "status"]).to_pylist():
        row["digest"] = row["digest"].hex()
        row["status"] = row["status"].partition(":")[0]
        row["elements"] = [{name: e[name] for name in ("tokens", "width", "height")} for e in row["elements"]]
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _rows(shard: ShardPath, kind: Kind, tokenizer: Tokenizer, phash: bool) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    with shard.open("rb") as file:
        for sample in walk_file(file, shard.stat().st_size):
            if isinstance(sample, Damage):
                yield _row(sample.key, sample.offset, 0, [], [], b"", sample.reason)
                continue
            if sample.damage:
                yield _row(sample.key, sample.offset, 0, [], [], b"", sample.damage)
                continue
            file.seek(sample.offset)
            data = file.read(sample.end - sample.offset)
            elements: list[dict[str, Any]] = []
            status = OK
            if sample.key in seen:
                status = DUPLICATE
            else:
                seen.add(sample.key)
                try:
                    elements = _elements(kind, sample, data, tokenizer, phash)
                except BadSample as error:
                    status = str(error)
            members = [{"extension": e, "offset": o, "size": s} for e, o, s in sample.members]
            yield _row(sample.key, sample.offset, sample.end - sample.offset, members, elements, data, status)


def _row(key: str, offset: int, size: int, members: list[Any], elements: list[Any], data: bytes, status: str) -> dict[str, Any]:
    status = status.encode("utf-8", "backslashreplace").decode()  # it may quote a JSON string, which may hold half a surrogate pair
    status = status[:REASON_LIMIT]
    return {
        "key": key,
        "offset": offset,
        "size": size,
        "members": members,
        "elements": elements,
        "digest": sample_digest(data),
        "status": status,
    }


def _elements(kind: Kind, sample: RawSample, data: bytes, tokenizer: Tokenizer, phash: bool) -> list[dict[str, Any]]:
    """Length of each text element, size of each image, and their fingerprints; each text is tokenised alone, so that lengths add up."""
    found = []
    for element in parse(kind, _members(sample, data)):
        if isinstance(element, ImageElement):
            width, height = image_size(element.data)
            looks = fingerprint.phash(element.data) if phash else None
            digest = fingerprint.image_digest(element.data)
            found.append({"tokens": 0, "width": width, "height": height, "digest": digest, "phash": looks})
        else:
            digest = fingerprint.text_digest(element.text) if isinstance(element, TextElement) else None
            found.append({"tokens": len(encode(element, tokenizer)), "width": 0, "height": 0, "digest": digest})
    return found


def _members(sample: RawSample, data: bytes) -> dict[str, bytes]:
    """Members by extension, from the bytes of the sample's range."""
    return {e: data[o - sample.offset : o - sample.offset + s] for e, o, s in sample.members}
