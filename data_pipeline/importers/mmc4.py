"""MMC4 documents with images that were fetched before: JSON lines with `text_list` and `image_info`.

Invariant: an image stands before the sentence that it was matched to; sentences between images are one text.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.importers.contract import Options, key_of
from data_pipeline.importers.documents import ImageName, document
from data_pipeline.importers.images import ImageFolder
from data_pipeline.importers.records import records
from data_pipeline.samples import BadSample
from data_pipeline.shards.write import Refused, Sample

SUFFIXES = (".jsonl",)


def samples(files: Sequence[Path], options: Options, task: int, tasks: int) -> Iterator[Sample | Refused]:
    """Documents; `image_name` is a path below the image folder."""
    images = ImageFolder(options.images)
    for number, file in enumerate(files):
        for row, record in records(file, task, tasks):
            try:
                if isinstance(record, BadSample):
                    raise record
                parts = _parts(record)
            except BadSample as error:
                yield Refused(file.name, row, str(error))
            else:
                yield from document(key_of(number, row), parts, images, file.name, row, between=" ")


def _parts(record: Mapping[str, Any]) -> list[str | ImageName]:
    sentences, infos = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences) or not isinstance(infos, list):
        raise BadSample("not a document: `text_list` must be a list of texts and `image_info` one of images")
    images: dict[int, list[ImageName]] = defaultdict(list)
    for i, info in enumerate(infos):
        name, at = (info.get("image_name"), info.get("matched_text_index")) if isinstance(info, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(at, int) or not 0 <= at < len(sentences):
            raise BadSample(f"not a document: image_info[{i}] must have an image_name and a matched_text_index within the text")
        images[at].append(ImageName(name))
    parts: list[str | ImageName] = []
    for i, sentence in enumerate(sentences):
        parts += images[i]
        if parts and isinstance(parts[-1], str):
            parts[-1] = f"{parts[-1]} {sentence}"
        else:
            parts.append(sentence)
    return parts
