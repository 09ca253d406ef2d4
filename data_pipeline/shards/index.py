"""The sidecar index of one shard: what each sample is, where it lies, how long it is, and whether it can be used.

Invariant: a sidecar exists whole or not at all, and describes exactly the bytes whose size and time it records. Damage is a row with
a status, never an exception.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.samples import BadSample, Kind, TextElement, guess_kind, image_size, parse
from data_pipeline.shards.tar import Damage, RawSample, walk
from data_pipeline.text.tokenizer import Tokenizer

VERSION = 1
SUFFIX = ".index.parquet"
OK = "ok"
DUPLICATE = "duplicate key"
REASON_LIMIT = 300
"""Longest status in characters: it may quote what the damage left."""

_ELEMENT = pa.struct([("tokens", pa.int32()), ("width", pa.uint16()), ("height", pa.uint16())])
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


def sidecar_path(shard: Path, index_dir: Path) -> Path:
    """Where the sidecar of `shard` lies."""
    return index_dir / (shard.name.removesuffix(".tar") + SUFFIX)


def list_shards(source: Path) -> list[Path]:
    """The shards of a source in the order of their names.

    Raises:
        UserError: no such folder, or no shard in it.
    """
    if not source.is_dir():
        raise UserError(f"no such shard folder: {source.resolve()} (give the folder that holds the .tar shards)")
    shards = sorted(source.glob("*.tar"))
    if not shards:
        raise UserError(f"no .tar shard in {source.resolve()} (a source is a folder of WebDataset tars)")
    return shards


def find_kind(shards: list[Path]) -> Kind:
    """The kind of a source, from its first sample that has one.

    Raises:
        UserError: no sample looks like anything known.
    """
    for shard in shards:
        for sample in walk(shard):
            if isinstance(sample, RawSample):
                kind = guess_kind({extension for extension, _, _ in sample.members})
                if kind is not None:
                    return kind
    raise UserError(f"no usable sample in {shards[0].parent} (pairs need an image and .txt, documents .json, text .txt; see --kind)")


def index_shard(shard: Path, index_dir: Path, kind: Kind, tokenizer: Tokenizer) -> bool:
    """Writes the sidecar of one shard; returns False where a sidecar that still holds was found.

    Raises:
        UserError: the index folder cannot be written.
        TryAgainError: the shard cannot be read now; nothing is written, since a failure that may pass is not damage.
    """
    target = sidecar_path(shard, index_dir)
    try:
        facts = _facts(shard, kind, tokenizer)
        if target.exists() and _same(read_facts(target), facts):
            return False
        table = pa.Table.from_pylist(list(_rows(shard, kind, tokenizer)), schema=SCHEMA)
    except OSError as error:
        raise TryAgainError(
            f"cannot read {shard}: {error.strerror} (mend the file system or its rights, then run the same again)"
        ) from None
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
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write the index {target}: {error.strerror} (free space, or choose another folder: --index-dir)") from None
    return True


def read_facts(sidecar: Path) -> dict[str, Any]:
    """What a sidecar says of itself; empty where it is not a sidecar of this program."""
    try:
        metadata = pq.read_schema(sidecar).metadata or {}
        return json.loads(metadata.get(b"facts", b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}


def read_index(sidecar: Path) -> ShardIndex:
    """A whole sidecar.

    Raises:
        UserError: it is missing or was not written by this program.
    """
    facts = read_facts(sidecar)
    if facts.get("version") != VERSION:
        raise UserError(f"no index {sidecar} (run: xc-data index {sidecar.parent} --tokenizer FOLDER)")
    try:
        return ShardIndex(facts, pq.read_table(sidecar))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"the index {sidecar} is damaged: {str(error).splitlines()[0]} (delete it, then run xc-data index again)") from None


def sample_digest(data: bytes) -> bytes:
    """Digest of a sample's bytes, headers and padding included: 16 bytes, of which the plan's columns keep the first 8."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _facts(shard: Path, kind: Kind, tokenizer: Tokenizer) -> dict[str, Any]:
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
    """Digest of what was found, free of paths and times, so that a copied shard is the same shard."""
    digest = hashlib.sha256()
    for row in table.select(["key", "offset", "size", "digest", "elements", "status"]).to_pylist():
        row["digest"] = row["digest"].hex()
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _rows(shard: Path, kind: Kind, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    with shard.open("rb") as file:
        for sample in walk(shard):
            if isinstance(sample, Damage):
                yield _row(sample.key, sample.offset, 0, [], [], b"", sample.reason)
                continue
            if sample.damage:
                yield _row(sample.key, sample.offset, 0, [], [], b"", sample.damage)
                continue
            file.seek(sample.offset)
            data = file.read(sample.end - sample.offset)
            elements: list[dict[str, int]] = []
            status = OK
            if sample.key in seen:
                status = DUPLICATE
            else:
                seen.add(sample.key)
                try:
                    elements = _elements(kind, sample, data, tokenizer)
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


def _elements(kind: Kind, sample: RawSample, data: bytes, tokenizer: Tokenizer) -> list[dict[str, int]]:
    """Length of each text element, size of each image; each text is tokenised alone, so that lengths add up."""
    members = {e: data[o - sample.offset : o - sample.offset + s] for e, o, s in sample.members}
    found = []
    for element in parse(kind, members):
        if isinstance(element, TextElement):
            found.append({"tokens": len(tokenizer.encode(element.text)), "width": 0, "height": 0})
        else:
            width, height = image_size(element.data)
            found.append({"tokens": 0, "width": width, "height": height})
    return found
