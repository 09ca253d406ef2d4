"""OBELICS documents with images that were fetched before: Parquet rows with the parallel lists `texts` and `images` (URLs).

Invariant: memory grows with a task's own share of the documents and not with the map of all images.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.importers import tables
from data_pipeline.importers.contract import Options, key_of
from data_pipeline.importers.documents import ImageName, document
from data_pipeline.importers.image_map import read_map
from data_pipeline.importers.images import ImageFolder
from data_pipeline.samples import BadSample
from data_pipeline.shards.write import Refused, Sample

SUFFIXES = (".parquet",)
COLUMNS = ("texts", "images")


def samples(files: Sequence[Path], options: Options, task: int, tasks: int) -> Iterator[Sample | Refused]:
    """Documents. Without a map the entries of `images` are paths below the image folder.

    Raises:
        UserError: the map of images cannot be read.
    """
    folder = ImageFolder(options.images)
    units = tables.share(files, task, tasks)
    path_of = read_map(options.image_map, _urls(files, units)) if options.image_map else None
    for unit in units:
        for item in _rows(files, unit, COLUMNS):
            if isinstance(item, Refused):
                yield item
                continue
            (row, value), name = item, files[unit.file].name
            try:
                parts = _parts(value, path_of)
            except BadSample as error:
                yield Refused(name, row, str(error))
            else:
                yield from document(key_of(unit.file, row), parts, folder, name, row, between="\n\n")


def _parts(value: Mapping[str, Any], path_of: Mapping[str, str] | None) -> list[str | ImageName]:
    texts, images = value["texts"], value["images"]
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadSample("not a document: `texts` and `images` must be lists of one length")
    parts: list[str | ImageName] = []
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise BadSample(f"not a document: exactly one of texts[{i}] and images[{i}] must be null")
        if not isinstance(text if image is None else image, str):
            raise BadSample(f"not a document: texts[{i}] or images[{i}] is neither text nor null")
        if image is None:
            parts.append(text)
        else:
            # what no map knows is looked for by its own name, and not found
            parts.append(ImageName(image if path_of is None else path_of.get(image, image)))
    return parts


def _urls(files: Sequence[Path], units: Sequence[tables.RowGroup | Refused]) -> set[str]:
    """The images that the task's own documents name."""
    found: set[str] = set()
    for unit in units:
        for item in _rows(files, unit, ("images",)):
            if not isinstance(item, Refused):
                found.update(image for image in item[1]["images"] or [] if isinstance(image, str))
    return found


def _rows(files: Sequence[Path], unit: tables.RowGroup | Refused, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]] | Refused]:
    return iter([unit]) if isinstance(unit, Refused) else tables.rows(files, unit, columns)
