"""A collection: pictures that an article may use, found by their captions. A LanceDB table on disk, searched from disk.

    C/collection.json     what it was made of, by which embedder, and which model looked at the pictures, if one did
    C/pictures.lance/     a row a picture: caption, its vector, where the picture lies, and the vector of what the model sees

Invariant: a collection appears whole or not at all; pictures stay where they are and are read when they are chosen.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lancedb
import numpy as np
import pyarrow as pa

from compose import embed
from compose.pictures import EXTENSIONS, Picture, told_beside
from data_pipeline.errors import UserError
from data_pipeline.read.images import decode
from data_pipeline.read.storage import ShardReader, elements_of
from data_pipeline.samples import BadSample, ImageElement, Kind, TextElement, image_size
from data_pipeline.shards.source import ShardSource
from train.run_dir import write_json

if TYPE_CHECKING:
    from compose.sight import Sight

FACTS = "collection.json"
TABLE = "pictures"
BATCH = 1024
INDEX_FROM = 20_000
"""Pictures from which on an inverted-file index is built; fewer are compared one by one, exactly, within milliseconds."""
PROBES = 32
"""Lists of that index that a search reads."""
NO_ROW = -1
SEEN = 32
"""Pictures that a model looks at at once."""
COLUMNS = {
    "name": pa.string(),
    "caption": pa.string(),
    "place": pa.string(),  # a picture file, or the folder of a source
    "row": pa.int64(),  # row of the source; NO_ROW for a file
}


@dataclass(frozen=True)
class Entry:
    """A picture's row, without its vectors."""

    name: str
    caption: str
    place: str
    row: int
    likeness: float = 0.0
    """Cosine to what was asked for."""


@dataclass(frozen=True)
class Built:
    """What a build found."""

    pictures: int
    unreadable: int


def build(origin: Path, output: Path, model: Path | None = None) -> Built:
    """Collects the pictures below a folder, or those of an indexed source of pairs.

    A source's captions are its texts. A file's is the text of the `.txt` beside it, or else what its name says. With a `model`, a run, a
    checkpoint or an export, each picture also gets the vector of what that model sees.

    Raises:
        UserError: nothing to collect there, `output` exists, or the model cannot be opened.
    """
    if output.exists():
        raise UserError(f"{output.absolute()} exists (choose another -o, or remove it)")
    damaged: list[str] = []
    source = ShardSource(origin.name, origin) if any(origin.glob("*.tar")) else None
    found = _of_source(source, origin, damaged) if source else _of_folder(origin, damaged)
    one = list(islice(found, 1))  # before a model is read
    sight = _open_sight(model) if one and model else None
    batches = _Batches(_looked_at(chain(one, found), sight, damaged))
    first = next(batches, None)
    if first is None:
        kinds = ", ".join(e[1:] for e in EXTENSIONS)
        raise UserError(f"no picture in {origin.absolute()} (give a folder with {kinds}, or a source of pairs)")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        table = lancedb.connect(partial).create_table(TABLE, data=chain([first], batches), schema=first.schema)
        count = table.count_rows()
        for column in ("vector", "sight")[: 2 if sight else 1] if count >= INDEX_FROM else ():
            table.create_index(metric="cosine", vector_column_name=column, index_type="IVF_FLAT")
        facts = {"of": str(origin.absolute()), "embedder": embed.NAME, "pictures": count, "unreadable": len(damaged)}
        if source:
            facts["index"] = source.facts.digest
        if sight:
            facts["sight"] = {"model": str(model.absolute()), "weights": sight.weights, "centre": batches.centre.tolist()}
        write_json(partial / FACTS, facts)
        partial.rename(output)
    except (OSError, RuntimeError) as error:  # LanceDB's own are either
        reason = (isinstance(error, OSError) and error.strerror) or str(error).split("\n", 1)[0]
        raise UserError(f"cannot write {output.absolute()}: {reason} (choose another -o)") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Built(count, len(damaged))


class Collection:
    """A collection to search."""

    def __init__(self, folder: Path) -> None:
        """Opens it.

        Raises:
            UserError: no collection, one of another embedder, or its table or the folder of its pictures is gone.
        """
        try:
            facts = json.loads((folder / FACTS).read_bytes())
            origin, self.size = Path(facts["of"]), int(facts["pictures"])
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{folder.absolute()} is no collection (make one: xc-compose collection build FOLDER -o C)") from None
        if facts.get("embedder") != embed.NAME:
            raise UserError(f"{folder.absolute()} was embedded by {facts.get('embedder')}, not {embed.NAME} (build it anew)")
        if not origin.is_dir():
            raise UserError(f"{folder.absolute()}: its pictures lay in {origin}, which is gone (build it anew)")
        self._sight: dict[str, Any] | None = facts.get("sight")
        self._index: str | None = facts.get("index")
        self._folder = folder
        with _undamaged(folder):
            self._table = lancedb.connect(folder).open_table(TABLE)
            self._table.search().select([*COLUMNS]).limit(1).to_list()
        self._sources: dict[str, ShardSource] = {}
        self._reader = ShardReader()

    def search(self, text: str, count: int) -> list[Entry]:
        """The pictures whose captions are nearest to a text, nearest first."""
        return self._nearest("vector", embed.embed([text])[0], count)

    def like(self, picture: Picture, count: int) -> list[Entry]:
        """The pictures that look most like one to the model that looked at the collection, the likest first.

        Raises:
            UserError: no model did, or it is gone or has other weights now.
        """
        if self._sight is None:
            raise UserError(
                f"{self._folder.absolute()} was built without a model (build it anew with --model CHECKPOINT to find by a picture)"
            )
        sight = _open_sight(Path(self._sight["model"]))
        if sight.weights != self._sight["weights"]:
            raise UserError(f"{self._sight['model']} has other weights than when it looked at {self._folder.absolute()} (build it anew)")
        vectors = embed.centred(sight.embed([sight.look(picture.data)]), np.array(self._sight["centre"], np.float32))
        return self._nearest("sight", vectors[0], count)

    def _nearest(self, column: str, vector: np.ndarray, count: int) -> list[Entry]:
        query = self._table.search(vector, vector_column_name=column).distance_type("cosine").nprobes(PROBES)
        with _undamaged(self._folder):
            found = query.select([*COLUMNS, "_distance"]).limit(count).to_list()
        return [Entry(*(f[name] for name in COLUMNS), likeness=1 - f["_distance"]) for f in found]

    def require_pictures(self) -> None:
        """Refuses a collection whose pictures have all gone.

        Raises:
            UserError: they have.
        """
        with _undamaged(self._folder):
            rows = self._table.search().select([*COLUMNS]).to_batches()
            entries = (Entry(**row) for batch in rows for row in batch.to_pylist())
            if not any(self._read(entry) for entry in entries):
                raise UserError(f"{self._folder.absolute()}: none of its {self.size} pictures can be read any more (build it anew)")

    def retrieve(self, text: str, count: int, without: set[str]) -> list[Picture]:
        """As `search`, with the pictures themselves: no picture twice, none of the digests `without`, none that is gone."""
        chosen: dict[str, Picture] = {}
        looked, wanted = 0, 3 * (count + len(without))  # the same picture may stand under several captions
        while len(chosen) < count and looked < min(wanted, self.size):
            for entry in self.search(text, wanted)[looked:]:
                picture = self._read(entry)
                if picture and picture.digest not in without:
                    chosen.setdefault(picture.digest, picture)
                if len(chosen) == count:
                    break
            looked, wanted = wanted, 4 * wanted
        return list(chosen.values())

    def _read(self, entry: Entry) -> Picture | None:
        try:
            data = Path(entry.place).read_bytes() if entry.row == NO_ROW else self._from_source(entry)
            decode(data)
        except (OSError, BadSample):
            return None
        return Picture(entry.name, data, entry.caption)

    def _from_source(self, entry: Entry) -> bytes:
        if entry.place not in self._sources:
            source = ShardSource(Path(entry.place).name, entry.place)
            if source.facts.digest != self._index:
                raise UserError(f"{self._folder.absolute()}: {entry.place} was indexed anew since, with other rows (build it anew)")
            self._sources[entry.place] = source
        elements = elements_of(Kind.pair, self._reader.read(self._sources[entry.place].locate(entry.row)))
        return next(e.data for e in elements if isinstance(e, ImageElement))


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    """Says of whatever LanceDB raises where files of a table are gone or cut short what it means."""
    try:
        yield
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"{folder.absolute()}: its table {TABLE}.lance is gone or damaged (build it anew)") from None


def among(pictures: Sequence[Picture], count: int) -> Callable[[str, set[str]], list[Picture]]:
    """Searches a few given pictures by their captions, or else by what their file names say; at most `count`, none of the digests given."""
    vectors = embed.embed([p.caption or _words_of(Path(p.name).stem) for p in pictures])

    def find(text: str, without: set[str]) -> list[Picture]:
        order = (-(vectors @ embed.embed([text])[0])).argsort(kind="stable")
        return [pictures[i] for i in order if pictures[i].digest not in without][:count]

    return find


def _open_sight(model: Path) -> "Sight":
    from compose.sight import Sight  # torch, which building from captions alone does without

    return Sight(model)


def _of_folder(folder: Path, damaged: list[str]) -> Iterator[tuple[Entry, bytes]]:
    if not folder.is_dir():
        raise UserError(f"no folder {folder.absolute()} (give a folder with pictures, or an indexed source)")
    for path in _files(folder, damaged):
        try:
            str(path.absolute()).encode()  # the table keeps text, which some names are not
            image_size(data := path.read_bytes())
            text = told_beside(path) or _words_of(path.stem)
        except (OSError, UnicodeEncodeError, BadSample):
            damaged.append(str(path))
            continue
        yield Entry(path.name, text, str(path.absolute()), NO_ROW), data


def _files(folder: Path, damaged: list[str]) -> Iterator[Path]:
    """Those below it that may be pictures, a folder's names at a time: the paths of millions would fill the memory."""
    for here, folders, names in os.walk(folder, onerror=lambda error: damaged.append(str(error.filename))):
        folders.sort()
        for path in (Path(here, name) for name in sorted(names)):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                yield path


def _of_source(source: ShardSource, folder: Path, damaged: list[str]) -> Iterator[tuple[Entry, bytes]]:
    if source.kind is not Kind.pair:
        raise UserError(f"{folder.absolute()} is a source of kind {source.kind.value}, whose pictures have no captions (give one of pairs)")
    reader = ShardReader()
    for row, name in enumerate(source.keys()):
        try:
            elements = elements_of(Kind.pair, reader.read(source.locate(row)))
        except BadSample:
            damaged.append(name)
            continue
        caption = next(e.text for e in elements if isinstance(e, TextElement))
        yield Entry(name, caption, str(folder.absolute()), row), next(e.data for e in elements if isinstance(e, ImageElement))


def _words_of(stem: str) -> str:
    """What a file name says: `Red-apple_2` is "Red apple 2"."""
    return re.sub(r"[\s_\-.+]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)).strip() or stem


def _looked_at(
    found: Iterator[tuple[Entry, bytes]], sight: "Sight | None", damaged: list[str]
) -> Iterator[tuple[Entry, np.ndarray | None]]:
    """Entries with what the model sees; only a few pictures are in memory at a time."""
    while part := list(islice(found, SEEN)):
        if sight is None:
            yield from ((entry, None) for entry, _ in part)
            continue
        looked = []
        for entry, data in part:
            try:
                looked.append((entry, sight.look(data)))
            except BadSample:
                damaged.append(entry.name)
        if looked:
            yield from zip((entry for entry, _ in looked), sight.embed([picture for _, picture in looked]), strict=True)


class _Batches:
    """Rows of the table; what a model sees is centred on the first batch."""

    def __init__(self, entries: Iterator[tuple[Entry, np.ndarray | None]]) -> None:
        self._entries = entries
        self.centre: np.ndarray | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        part = list(islice(self._entries, BATCH))
        if not part:
            raise StopIteration
        entries = [entry for entry, _ in part]
        columns = {name: pa.array([getattr(e, name) for e in entries], kind) for name, kind in COLUMNS.items()}
        columns["vector"] = _vectors(embed.embed([e.caption for e in entries]))
        if part[0][1] is not None:
            seen = np.stack([vector for _, vector in part])
            self.centre = seen.mean(0) if self.centre is None else self.centre
            columns["sight"] = _vectors(embed.centred(seen, self.centre))
        return pa.RecordBatch.from_pydict(columns)


def _vectors(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
