"""JSON lists or lines with an image folder, as LLaVA and ShareGPT4V write them: {image, conversations}, or {image, caption}.

Invariant: a source has one kind; it is that of the first record, and a record of the other kind is left out.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.importers import members
from data_pipeline.importers.contract import Options, key_of
from data_pipeline.importers.images import ImageFolder
from data_pipeline.importers.records import records
from data_pipeline.samples import BadSample
from data_pipeline.shards.write import Refused, Sample

SUFFIXES = (".json", ".jsonl")
CAPTIONS = ("caption", "text")


def samples(files: Sequence[Path], options: Options, task: int, tasks: int) -> Iterator[Sample | Refused]:
    """Conversations or pairs, whichever the first record is."""
    images = ImageFolder(options.images)
    talks = any("conversations" in record for record in _first_record(files))
    for number, file in enumerate(files):
        for row, record in records(file, task, tasks):
            try:
                if isinstance(record, BadSample):
                    raise record
                yield Sample(key_of(number, row), _conversation(record, images) if talks else _pair(record, images))
            except BadSample as error:
                yield Refused(file.name, row, str(error))


def _conversation(record: dict[str, Any], images: ImageFolder) -> dict[str, bytes]:
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise BadSample("not a conversation: the source's first record is one")
    return members.conversation({**record, "conversations": members.place(turns)}, _images(record, images))


def _pair(record: dict[str, Any], images: ImageFolder) -> dict[str, bytes]:
    if "conversations" in record:
        raise BadSample("not a pair: the source's first record is one")
    return members.pair(_images(record, images), next((record[name] for name in CAPTIONS if name in record), None))


def _images(record: dict[str, Any], images: ImageFolder) -> list[bytes]:
    """The images that `image` names, one or a list; none for plain text."""
    names = record.get("image") or []
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise BadSample("not a record: `image` must be the name of a file, or a list of names")
    return [images.read(name) for name in names]


def _first_record(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The first record that is one, if any."""
    found = (record for file in files for _, record in records(file) if not isinstance(record, BadSample))
    first = next(found, None)
    return iter([first] if first is not None else [])
